"""The status of each rank of a job, and which ranks the others are waiting for."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moa_dist.distributed.comm_timer import Progress, described

_PACKAGE = f"{Path(__file__).parents[1]}/"
_MAX_CHARS = 300
"""Maximum length of a text in a message."""


@dataclass(frozen=True)
class RankStatus:
    """What one rank is doing at one moment."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Name of the machine it runs on."""
    step: int | None
    """Current training step; None between steps."""
    begun: int
    """Number of collectives it has started."""
    what: str
    """Describes the last of them."""
    inside: bool
    """Whether it is waiting in that collective."""
    seconds: float
    """Time since it entered or left that collective."""
    at: str
    """The innermost line of the main thread, and the innermost line in this package."""

    def __str__(self) -> str:
        where = "is between steps" if self.step is None else f"is in step {self.step}"
        does = "has started no collective"
        if self.begun:
            does = f"{'is waiting in' if self.inside else 'is past'} collective {self.begun}"
            does += f", {self.what}, for {self.seconds:.0f} s"
        return f"rank {self.rank} (host {self.host}) {where}; {does}; at {self.at}"


def own_status(rank: int, step: int | None, progress: Progress) -> RankStatus:
    """Return the status of this process; may be called from any of its threads."""
    return RankStatus(
        rank=rank,
        host=socket.gethostname(),
        step=step,
        begun=progress.begun,
        what=described(progress.what)[:_MAX_CHARS],
        inside=progress.inside,
        seconds=round(time.monotonic() - progress.since, 1),
        at=_location(sys._current_frames().get(threading.main_thread().ident or 0))[:_MAX_CHARS],
    )


def _location(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None:
        file = frame.f_code.co_filename
        is_ours = file.startswith(_PACKAGE)
        if is_ours or not lines:
            name = file.removeprefix(_PACKAGE) if is_ours else Path(file).name
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        if is_ours:
            break
        frame = frame.f_back
    return ", called at ".join(lines) or "an unknown location"


def all_stacks() -> str:
    """Return the stacks of all threads of this process, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def find_stragglers(known: Sequence[RankStatus]) -> tuple[list[RankStatus], str]:
    """Return the ranks that the others are waiting for, and the reason.

    The list is empty if no single rank stands out.
    """
    fewest = min(status.begun for status in known)
    behind = [status for status in known if status.begun == fewest]
    if len(behind) < len(known):
        return behind, "has not reached the collective that the others are waiting in"
    working = [status for status in known if not status.inside]
    if working and len(working) < len(known):
        return working, "is past the collective that the others are waiting in"
    if working:
        return [], "no rank is behind and none is waiting in a collective: all of them are slow"
    return [], "all ranks are waiting in the same collective: check the network between them"


def summary(known: Sequence[RankStatus], silent: Iterable[int]) -> tuple[str, str]:
    """Summarize all ranks: the conclusion in one line, and one line per rank that answered."""
    lines = [str(status) for status in sorted(known, key=lambda s: s.rank)]
    missing = sorted(silent)
    if missing:
        names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        first = f"{names} did not answer: stopped, or stuck in native code"
    elif len(known) == 1:
        first = str(known[0])
    else:
        culprits, why = find_stragglers(known)
        first = "; ".join(f"{culprit}, and {why}" for culprit in culprits[:4]) or why
        if len(culprits) > 4:
            first += f"; and {len(culprits) - 4} more"
    return first, "\n".join(lines)
