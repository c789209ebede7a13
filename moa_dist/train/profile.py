"""A trace of chosen steps on chosen ranks, and the time per part that it shows.

Which part an operation belongs to is said by the innermost label around it (`moa_dist.profiling`).
On a CPU its time is that of the main thread, on a GPU that of its kernels, waiting for other ranks
included in both.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moa_dist.config.run import ProfileConfig
from moa_dist.profiling import PREFIX, StepPart, annotate

FOLDER = "profile"
"""In the run's folder: of every traced rank `rank-N.json.gz`, and `rank-N.parts.json`."""
OTHER: StepPart = "other"
"""What has no other label: embedding, norms, head, copies, Python."""
_BACKWARD = "backward"


class Tracer:
    """Records this rank's part of `profile`."""

    def __init__(
        self, config: ProfileConfig, run_folder: Path, rank: int, device: torch.device
    ) -> None:
        self._first, self._last = config.steps or (0, 0)
        self._ranks, self._rank = config.ranks, rank
        self._folder = run_folder / FOLDER
        self._on_gpu = device.type == "cuda"
        self._profile: profile | None = None
        self._is_complete = False
        if config.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one attempt at a step; a refused one leaves by an error and is traced too."""
        is_chosen = self._first <= step <= self._last
        if is_chosen and self._profile is None and self._rank in self._ranks:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu]
            # Neither shapes nor stacks: they would make the file many times as large.
            self._profile = profile(activities=activities)
            self._first = step  # later, where a run was resumed among the chosen steps
            self._profile.start()
        with annotate(OTHER):
            yield
        if step == self._last:
            self._is_complete = True
            if self._profile:
                self._profile.stop()

    def close(self) -> None:
        """Give up a trace that has not come to its last step."""
        if self._profile and not self._is_complete:
            self._profile.stop()

    def write(self) -> list[str]:
        """Between two steps: write a trace that is complete; returns what to say about it."""
        if not self._is_complete:
            return []
        steps, done = (self._first, self._last), self._profile
        self._first, self._last, self._profile, self._is_complete = 0, 0, None, False
        files = ", ".join(str(self._folder / f"rank-{rank}.json.gz") for rank in self._ranks[:4])
        notes = [
            f"traced steps {steps[0]} to {steps[1]}: {files}; "
            "open one at https://ui.perfetto.dev or in chrome://tracing"
        ]
        if done is None:
            return notes
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}.json.gz"
        done.export_chrome_trace(str(path))
        with gzip.open(path) as file:
            total_by_part = time_by_part(json.load(file)["traceEvents"], on_gpu=self._on_gpu)
        num_steps = steps[1] - steps[0] + 1
        parts = {name: ms / num_steps for name, ms in total_by_part.items() if ms > 0}
        record = {"steps": steps, "rank": self._rank, "on_gpu": self._on_gpu, "milliseconds": parts}
        (self._folder / f"rank-{self._rank}.parts.json").write_text(json.dumps(record) + "\n")
        total = sum(parts.values())
        shares = ", ".join(f"{name} {ms / total:.0%}" for name, ms in parts.items())
        return [*notes, f"of {total:.1f} ms per traced step on rank {self._rank}: {shares}"]


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
