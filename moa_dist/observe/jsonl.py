"""Writes and reads the metrics file, with one JSON object per line, that plots are made from."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

from moa_dist.errors import DataError
from moa_dist.models.calls import RouterCall, RouterKey
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.metrics import RunStart, SampleMetrics, StepMetrics, ValidationMetrics
from moa_dist.observe.routing import router_call_name, routing_summary
from moa_dist.observe.traffic_names import traffic_name

FILE_NAME = "metrics.jsonl"
"""Name of the file in the run's folder."""


class MetricsFile:
    """Writes `metrics.jsonl`: objects of kind `start`, `step`, `validation`, `samples`
    and `note`.

    Each object has a `step`: for a start, the step that training resumes after; for a note, the
    last step written. Its `time` is when it was written, in seconds since 1970. A float is written
    with enough digits that reading it back gives the same bits; one that is not finite becomes
    null, because JSON cannot represent it. A run that resumes or rolls back truncates the file
    after its first step, so the file always reads like that of one uninterrupted run.
    """

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._step = 0
        self._routing: dict[RouterCall, RoutingReport] = {}
        self._mean_names: Mapping[RouterKey, Sequence[str]] = {}

    def start(self, run: RunStart) -> None:
        """Open the file, truncate it, and write configuration, sizes and provenance."""
        path = Path(run.folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, run.first_step)
        self._file = path.open("ab", buffering=0)
        values = _shallow(run)
        self._mean_names = values.pop("mean_names")
        values["config"] = run.config.model_dump(mode="json")
        values["looks_ahead"] = run.config.model.looks_ahead
        values["provenance"] = asdict(run.provenance)
        values["hosts"] = Counter(run.hosts)
        values["routers"] = {name: size._asdict() for name, size in run.routers.items()}
        self._write("start", run.first_step, values)

    def step(self, metrics: StepMetrics) -> None:
        """Write all values, with a summary per router, the traffic per layer, and the timing."""
        self._routing = metrics.routing
        values = _shallow(metrics)
        values["routing"] = {
            router_call_name(call): routing_summary(report, self._mean_names.get(call.key, ()))
            for call, report in metrics.routing.items()
        }
        values["traffic"] = {
            traffic_name(key): volume._asdict() for key, volume in metrics.traffic.items()
        }
        values["sources"] = {name: read._asdict() for name, read in metrics.sources.items()}
        values["parts"] = {part: norms._asdict() for part, norms in metrics.parts.items()}
        values |= asdict(metrics.timing)
        del values["timing"]
        self._write("step", metrics.step, values)

    def validation(self, metrics: ValidationMetrics) -> None:
        """Write all values, and every expert's load [G, E] in the last reported step."""
        # Not at every step: there can be thousands of experts.
        values = asdict(metrics)
        values["load"] = {
            router_call_name(call): report.load.tolist() for call, report in self._routing.items()
        }
        self._write("validation", metrics.step, values)

    def samples(self, metrics: SampleMetrics) -> None:
        """Write all texts."""
        values = asdict(metrics)
        values["samples"] = [sample._asdict() for sample in metrics.samples]
        self._write("samples", metrics.step, values)

    def rewind(self, step: int) -> None:
        """Truncate the file after this step."""
        assert self._file is not None, "start comes first"
        path = Path(str(self._file.name))
        self._file.close()
        _cut(path, step, same_start=True)
        self._file = path.open("ab", buffering=0)
        self._step, self._routing = step, {}

    def note(self, message: str) -> None:
        """Write the message as a note."""
        self._write("note", self._step, {"message": message})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        assert self._file is not None, "start comes first"
        self._step = step
        record = _strict({"kind": kind, "step": step, "time": round(time.time(), 1)} | values)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        # Whole lines at once: a concurrent reader, or one after a crash, misses one line at most,
        # and a line that a full disk cuts short is removed.
        size = self._file.seek(0, SEEK_END)
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            raise OSError(error.errno, error.strerror, str(self._file.name)) from error


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a file, ignoring a last line that a crash cut short.

    Floats that were not finite are None.

    Raises:
        DataError: A line is not a valid record.
    """
    return (record for record, _ in _records(Path(path)))


def _cut(path: Path, first_step: int, *, same_start: bool = False) -> None:
    """Truncate the file at the first record after `first_step`.

    Without `same_start`, a start record at `first_step` itself is cut off too: it belongs to an
    earlier attempt to resume from the same checkpoint.
    """
    if not path.exists():
        return
    length = 0
    for record, end in _records(path):
        is_start = record["kind"] == "start"
        is_repeated = is_start and record["step"] == first_step and not same_start
        if record["step"] > first_step or is_repeated:
            break
        length = end
    with path.open("r+b") as file:
        file.truncate(length)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Iterate over the objects, each with the offset at which its line ends."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            # A crash can only cut the last line short, and then its newline is missing.
            if line.endswith(b"\n"):
                yield _parse(line, f"{path}:{number}"), end


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if isinstance(record["kind"], str) and isinstance(record["step"], int):
            return record
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DataError(f"{where}: damaged: not a metrics record; delete the line, or the file")


def _strict(value: Any) -> Any:
    """Replace floats that are not finite by None."""
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shallow(value: RunStart | StepMetrics) -> dict[str, Any]:
    """Return the fields by name; unlike `asdict` this copies no tensors."""
    return {field.name: getattr(value, field.name) for field in fields(value)}
