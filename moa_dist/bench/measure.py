"""Times alternatives in turns, and measures their memory.

A machine's speed drifts, so alternatives take turns and are compared round by round: a ratio is the
median over rounds of two times measured within seconds of each other.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One alternative, or one part of one."""

    name: str
    seconds: tuple[float, ...]
    """Times, one per round."""
    ratios: tuple[float, ...]
    """Time relative to the reference, one per round."""
    peak_bytes: int | None = None
    """Peak memory above what was held before the call; None if not measured."""
    note: str = ""
    """Remark printed at the end of the row."""


@dataclass(frozen=True)
class Table:
    """Rows that were measured together."""

    title: str
    rows: list[Row]
    tokens: int | None = None
    """Tokens per call, for rates; None if calls process no tokens."""
    notes: list[str] = field(default_factory=list)


def compare(
    work: Mapping[str, Work],
    device: torch.device,
    *,
    repetitions: int,
    notes: Mapping[str, str] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    memory: bool = True,
    after: Mapping[str, Work] | None = None,
) -> list[Row]:
    """Time all `work` in turns; the first is the reference of all ratios.

    The gradients of `modules`, one module per work, do not count as memory: their size does not
    depend on tokens, and they remain after the call. `after` names work to do, untimed, after each
    call.
    """
    after = after or {}

    def tidy(name: str) -> None:
        if name in after:
            after[name]()

    for name, once in work.items():
        for _ in range(2):  # lazy initialization, and the allocator's first blocks
            once()
            tidy(name)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repetitions):
        for name, once in work.items():
            seconds[name].append(_time(once, device))
            tidy(name)
    reference = next(iter(seconds.values()))

    def kept(name: str) -> int:
        parameters = modules[name].parameters() if modules else ()
        return sum(parameter.nbytes for parameter in parameters)

    return [
        Row(
            name,
            tuple(times),
            tuple(a / b for a, b in zip(times, reference, strict=True)),
            peak_bytes(work[name], device) - kept(name) if memory else None,
            (notes or {}).get(name, ""),
        )
        for name, times in seconds.items()
    ]


def _time(once: Work, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    once()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(once: Work, device: torch.device) -> int:
    """Return the peak of bytes held during one call, above what was held before it."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # torch counts CPU allocations only while profiling, and reports them only in the trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints at start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def bytes_per_token(row: Row, tokens: int) -> float | None:
    """Return peak bytes per token, or None if the peak was not measured."""
    return None if row.peak_bytes is None else row.peak_bytes / tokens


def as_text(table: Table) -> str:
    """Format a table for people: medians, and the range of ratios over rounds."""
    width = max(len(row.name) for row in table.rows)
    lines = [
        table.title,
        f"  {'':<{width}}  {'median ms':>10} {'best ms':>9} {'ratio':>7} {'from - to':>13} "
        f"{'tok/s':>9} {'peak B/tok':>11}",
    ]
    for row in table.rows:
        best = f"{min(row.seconds) * 1e3:.1f}"
        rate = "" if table.tokens is None else f"{table.tokens / median(row.seconds):,.0f}"
        span = f"{min(row.ratios):.2f} - {max(row.ratios):.2f}"
        held = None if table.tokens is None else bytes_per_token(row, table.tokens)
        memory = "" if held is None else f"{held:,.0f}"
        lines.append(
            f"  {row.name:<{width}}  {median(row.seconds) * 1e3:>10.1f} {best:>9} "
            f"{median(row.ratios):>7.2f} {span:>13} "
            f"{rate:>9} {memory:>11}  {row.note}".rstrip()
        )
    return "\n".join([*lines, *(f"  {note}" for note in table.notes)])


def as_json(table: Table) -> dict[str, object]:
    """Return a table as JSON types, with every round."""
    return {
        "title": table.title,
        "tokens": table.tokens,
        "notes": table.notes,
        "rows": [
            {
                "name": row.name,
                "median_s": median(row.seconds),
                "ratio": median(row.ratios),
                "seconds": row.seconds,
                "ratios": row.ratios,
                "peak_bytes_per_token": table.tokens and bytes_per_token(row, table.tokens),
                "note": row.note,
            }
            for row in table.rows
        ],
    }
