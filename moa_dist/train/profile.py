"""A trace of chosen steps on chosen ranks, and the time per part that it shows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moa_dist.config.run import ProfileConfig
from moa_dist.observe.trace_parts import OTHER, time_by_part
from moa_dist.profiling import annotate

FOLDER = "profile"
"""Subfolder of the run's folder with `rank-N.json.gz` and `rank-N.parts.json` per traced rank."""


class Tracer:
    """Records this rank's traces, as section `profile` asks."""

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
        """Trace one attempt at a step, also one that is rejected, which raises an error."""
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
        """Drop a trace that has not reached its last step."""
        if self._profile and not self._is_complete:
            self._profile.stop()

    def write(self) -> list[str]:
        """Write a trace that is complete, between two steps; returns lines about it."""
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
