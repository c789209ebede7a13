"""Time by part of a step, from a trace of it.

An operation belongs to the part of the innermost label around it (see `moa_dist.profiling`). On a
CPU its time is that of the main thread, on a GPU that of its kernels; both include waiting for
other ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from moa_dist.profiling import PREFIX, StepPart

OTHER: StepPart = "other"
"""What has no other label: embedding, norms, head, copies, Python."""
_BACKWARD = "backward"


def time_by_part(events: Iterable[Mapping[str, Any]], *, on_gpu: bool) -> dict[str, float]:
    """Milliseconds by part, most first, of a Chrome trace's events.

    A part within the backward pass is `PART (backward)`; `backward` is what remains of that.
    """
    # Not torch's own summary of events: it takes minutes for a trace that is read in seconds.
    spans = [event for event in events if event.get("ph") == "X"]
    host = [event for event in spans if event.get("cat") in ("cpu_op", "user_annotation")]
    main = {event["tid"] for event in host if event["name"] == PREFIX + _BACKWARD}
    milliseconds: dict[str, float] = defaultdict(float)
    part_of_launch: dict[Any, str] = {}
    for tid, thread in groupby(sorted(host, key=_in_order), key=lambda event: event["tid"]):
        open_spans: list[tuple[float, list[str], str]] = []
        # Autograd has threads of its own for devices.
        outermost = [] if tid in main else [_BACKWARD]
        for event in thread:
            start, length = event["ts"], event["dur"]
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            labels = open_spans[-1][1] if open_spans else outermost
            if event["name"].startswith(PREFIX):
                labels = [*labels, event["name"].removeprefix(PREFIX)]
            name = _part(labels)
            part_of_launch[event["args"].get("External id")] = name
            if not on_gpu and tid in main:
                milliseconds[name] += length / 1000
                if open_spans:
                    milliseconds[open_spans[-1][2]] -= length / 1000
            open_spans.append((start + length, labels, name))
    for event in spans:
        if on_gpu and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = part_of_launch.get(event["args"].get("External id"), OTHER)
            milliseconds[name] += event["dur"] / 1000
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def _in_order(event: Mapping[str, Any]) -> tuple[str, float, float]:
    """By thread; of spans that begin together, the outer one first."""
    return str(event["tid"]), event["ts"], -event["dur"]


def _part(labels: Sequence[str]) -> str:
    if not labels:
        return OTHER
    *outer, innermost = labels
    return f"{innermost} ({_BACKWARD})" if _BACKWARD in outer else innermost
