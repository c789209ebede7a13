"""Where each rank of a job stands, and which of them the others wait for."""

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
_MOST = 300
"""Characters of a text that travels."""


@dataclass(frozen=True)
class RankStatus:
    """What one rank does at a moment."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Where it runs."""
    step: int | None
    """The step that it takes; None between steps."""
    begun: int
    """Collectives that it has begun."""
    what: str
    """What the last of them carries."""
    inside: bool
    """It waits in that one."""
    seconds: float
    """Since it came to that one or out of it."""
    at: str
    """The innermost line of the main thread, and that of this package."""

    def __str__(self) -> str:
        where = "is between steps" if self.step is None else f"is in step {self.step}"
        does = "has begun no collective"
        if self.begun:
            does = f"{'waits in' if self.inside else 'is past'} collective {self.begun}"
            does += f", {self.what}, since {self.seconds:.0f} s"
        return f"rank {self.rank} (host {self.host}) {where}; {does}; at {self.at}"


def own_status(rank: int, step: int | None, progress: Progress) -> RankStatus:
    """Of this process, seen from any of its threads."""
    return RankStatus(
        rank=rank,
        host=socket.gethostname(),
        step=step,
        begun=progress.begun,
        what=described(progress.what)[:_MOST],
        inside=progress.inside,
        seconds=round(time.monotonic() - progress.since, 1),
        at=_place(sys._current_frames().get(threading.main_thread().ident or 0))[:_MOST],
    )


def _place(frame: FrameType | None) -> str:
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
    return ", called at ".join(lines) or "an unknown place"


def all_stacks() -> str:
    """Of all threads of this process, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def find_stragglers(known: Sequence[RankStatus]) -> tuple[list[RankStatus], str]:
    """Ranks for which the others wait, and why that follows; none where it does not."""
    fewest = min(status.begun for status in known)
    behind = [status for status in known if status.begun == fewest]
    if len(behind) < len(known):
        return behind, "has not come to the collective in which the others wait"
    at_work = [status for status in known if not status.inside]
    if at_work and len(at_work) < len(known):
        return at_work, "is past the collective in which the others wait"
    if at_work:
        return [], "all ranks have begun as many collectives and wait in none: all of them are slow"
    return [], "all ranks wait in the same collective: look at the network between them"


def summary(known: Sequence[RankStatus], silent: Iterable[int]) -> tuple[str, str]:
    """What to say of all ranks: in one line, and in one line each."""
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
