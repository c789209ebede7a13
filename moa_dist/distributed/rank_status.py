"""The status of each rank of a job, and which ranks the others are waiting for."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from moa_dist.distributed.comm_timer import Progress, described

_PACKAGE = f"{Path(__file__).parents[1]}/"
_MAX_CHARS = 300
"""Maximum length of a text in a message."""


Wait = Literal["silent", "behind", "past", "slow", "waiting", "alone"]
"""Why a step takes too long: some ranks do not answer; they have begun fewer collectives; they have
left the collective that the others are in; all compute; all are in the same collective; or there
is only one rank."""
_REASONS: dict[Wait, str] = {
    "behind": "has not reached the collective that the others are waiting in",
    "past": "is past the collective that the others are waiting in",
    "slow": "no rank is behind and none is waiting in a collective: all of them are slow",
    "waiting": "all ranks are waiting in the same collective: check the network between them",
}


class Conclusion(NamedTuple):
    """What the status of all ranks says about a step that takes too long."""

    kind: Wait
    """What was found."""
    ranks: tuple[int, ...]
    """Ranks that the others are waiting for; empty if none stands out."""
    text: str
    """Both in one line."""


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


def find_stragglers(known: Sequence[RankStatus]) -> tuple[Wait, list[RankStatus]]:
    """Return the reason for a wait among several ranks, and the ranks that the others wait for.

    The list is empty if no single rank stands out.
    """
    fewest = min(status.begun for status in known)
    behind = [status for status in known if status.begun == fewest]
    if len(behind) < len(known):
        return "behind", behind
    working = [status for status in known if not status.inside]
    if working and len(working) < len(known):
        return "past", working
    return ("slow" if working else "waiting"), []


def summary(known: Sequence[RankStatus], silent: Iterable[int]) -> tuple[Conclusion, str]:
    """Summarize all ranks: the conclusion, and one line per rank that answered."""
    known = sorted(known, key=lambda status: status.rank)
    return _conclude(known, tuple(sorted(silent))), "\n".join(map(str, known))


def _conclude(known: Sequence[RankStatus], silent: tuple[int, ...]) -> Conclusion:
    if silent:
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        text = f"{names} did not answer: stopped, or stuck in native code"
        return Conclusion("silent", silent, text)
    if len(known) == 1:
        return Conclusion("alone", (), str(known[0]))
    kind, culprits = find_stragglers(known)
    why = _REASONS[kind]
    text = "; ".join(f"{culprit}, and {why}" for culprit in culprits[:4]) or why
    if len(culprits) > 4:
        text += f"; and {len(culprits) - 4} more"
    return Conclusion(kind, tuple(culprit.rank for culprit in culprits), text)


def progress(
    earlier: Mapping[int, RankStatus], later: Mapping[int, RankStatus], seconds: float
) -> str | None:
    """Describe how far the ranks have come between two looks; None if one has not moved.

    Ranks that answered only once do not count.
    """
    twice = sorted(earlier.keys() & later.keys())
    if any((earlier[r].begun, earlier[r].step) == (later[r].begun, later[r].step) for r in twice):
        return None
    begun = later[twice[0]].begun - earlier[twice[0]].begun
    now = later[twice[0]].step
    where = "between steps" if now is None else f"in step {now}"
    return f"healthy: every rank goes on, {begun} collectives in {seconds:.0f} s, now {where}"
