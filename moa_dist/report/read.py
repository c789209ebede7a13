"""What a run's folder says, as values. What is missing or damaged becomes a problem to show."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moa_dist.analyze.results import ANALYSIS_FOLDER, Analysis, load_analysis
from moa_dist.checkpoint.format import Index, Reader, checkpoints
from moa_dist.distributed import watchdog
from moa_dist.errors import DataError
from moa_dist.launch.supervisor import ATTEMPTS_FILE
from moa_dist.models.stack import RouterCall
from moa_dist.observe.jsonl import FILE_NAME, read_metrics
from moa_dist.observe.routing import router_call_of
from moa_dist.observe.traffic_names import layer_and_purpose
from moa_dist.report.series import Series
from moa_dist.train import out_of_memory, profile

CONFIG_FILE = "config.yaml"
_MOST_REPORTS = 20
_MOST_TEXT = 20_000
_SCALARS = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "tokens",
    "samples",
    "step_seconds",
    "communication_share",
)
"""Of a step."""
_VALIDATION = ("loss", "perplexity", "bits_per_byte")

Load = dict[RouterCall, NDArray[np.float64]]
"""Of each router application, assignments [G, E]: G router groups, E experts each."""


@dataclass(frozen=True)
class Note:
    """Something that the run said."""

    step: int
    """The last step reported before it."""
    message: str


@dataclass(frozen=True)
class Trace:
    """Where the time of traced steps went on one rank."""

    rank: int
    first: int
    """First traced step."""
    last: int
    """The last one."""
    on_gpu: bool
    """Times are those of kernels."""
    parts: dict[str, float]
    """Milliseconds per step, by part."""


@dataclass
class Run:
    """All that is known of a run."""

    folder: Path
    """Where it was read from."""
    config: dict[str, Any] = field(default_factory=dict)
    """Its configuration, not validated: another version may have written it."""
    config_text: str = ""
    """The same as YAML."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The last start: sizes, device, ranks."""
    starts: list[int] = field(default_factory=list)
    """Steps after which training began or went on."""
    series: dict[str, Series] = field(default_factory=dict)
    """By name: `loss`, `validation/loss`, `aux_losses/NAME`, `traffic/PURPOSE/LAYER` in MiB..."""
    routing: dict[str, dict[RouterCall, Series]] = field(default_factory=dict)
    """By measure, such as `drop_share`."""
    loads: list[tuple[int, Load]] = field(default_factory=list)
    """The first and the last that were written, with their steps."""
    slowest: list[str] = field(default_factory=list)
    """Of each report, the rank that had most work, such as `rank 3 (node-1)`."""
    traces: list[Trace] = field(default_factory=list)
    """By rank."""
    reports: dict[str, str] = field(default_factory=dict)
    """Name -> text of what was written about hangs and want of memory."""
    notes: list[Note] = field(default_factory=list)
    """In order."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """What the supervisor recorded of each."""
    checkpoints: list[Index] = field(default_factory=list)
    """Oldest first."""
    analysis: Analysis | None = None
    """What `moa-dist analyze` found, if it was asked."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        """As configured, else the folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    def setting(self, path: str) -> Any:
        """A value of the configuration, such as `train.steps`; None if it has none."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def group(self, prefix: str) -> dict[str, Series]:
        """Series whose names begin with `prefix`, by the rest of their names."""
        return {
            name.removeprefix(prefix): series
            for name, series in self.series.items()
            if name.startswith(prefix)
        }


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises DataError if it holds nothing of a run: neither metrics nor configuration nor
    checkpoints.
    """
    found = checkpoints(folder)
    if not found and not any((folder / name).exists() for name in (FILE_NAME, CONFIG_FILE)):
        raise DataError(
            f"{folder}: no run: neither {FILE_NAME} nor {CONFIG_FILE} nor a checkpoint; name the "
            "folder that training wrote, such as runs/NAME"
        )
    run = Run(folder)
    _read_metrics(run)
    _read_config(run)
    _read_attempts(run)
    _read_traces(run)
    _read_reports(run)
    try:
        run.analysis = load_analysis(folder / ANALYSIS_FOLDER)
    except DataError as error:
        run.problems.append(str(error))
    for path in found:
        try:
            run.checkpoints.append(Reader(path).index)
        except DataError as error:
            run.problems.append(str(error))
    return run


def _read_metrics(run: Run) -> None:
    columns: dict[str, _Column] = defaultdict(_Column)
    routing: dict[str, dict[RouterCall, _Column]] = defaultdict(lambda: defaultdict(_Column))
    try:
        for record in read_metrics(run.folder / FILE_NAME):
            kind, step = record["kind"], record["step"]
            if kind == "start":
                run.starts.append(step)
                run.facts = record
                run.config = _mapping(record.get("config"))
            elif kind == "note":
                run.notes.append(Note(step, str(record.get("message"))))
            elif kind == "step":
                if slowest := _mapping(record.get("slowest")):
                    run.slowest.append(f"rank {slowest.get('rank')} ({slowest.get('host')})")
                for name, value in _step_values(record):
                    columns[name].add(step, value)
                for name, summary in _mapping(record.get("routing")).items():
                    if call := router_call_of(name):
                        for measure, value in _mapping(summary).items():
                            routing[measure][call].add(step, value)
            elif kind == "validation":
                for name in _VALIDATION:
                    columns[f"validation/{name}"].add(step, record.get(name))
                if load := _load(record.get("load")):
                    # Of all, the page shows the first and the last.
                    run.loads = [*run.loads[:1], (step, load)]
    except (OSError, DataError) as error:
        run.problems.append(_what_happened(error))
    run.series = {name: column.series() for name, column in columns.items()}
    run.routing = {
        measure: {call: column.series() for call, column in sorted(calls.items())}
        for measure, calls in routing.items()
    }


def _step_values(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _SCALARS:
        yield name, record.get(name)
    for group in ("aux_losses", "gpu"):
        for name, value in _mapping(record.get(group)).items():
            yield f"{group}/{name}", value
    for which in ("slowest", "fastest"):
        yield f"{which}/seconds", _mapping(record.get(which)).get("seconds")
    mib: dict[str, float] = defaultdict(float)
    for key, volume in _mapping(record.get("traffic")).items():
        layer, purpose = layer_and_purpose(key)
        mib[f"traffic/{purpose}/{layer}"] += _number(_mapping(volume).get("num_bytes")) / 2**20
    yield from mib.items()


def _read_config(run: Run) -> None:
    path = run.folder / CONFIG_FILE
    try:
        run.config_text = path.read_text(encoding="utf-8")
        run.config = _mapping(yaml.safe_load(run.config_text)) or run.config
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(_what_happened(error, path))
        run.config_text = run.config_text or yaml.safe_dump(run.config, sort_keys=False)


def _read_attempts(run: Run) -> None:
    """Only a supervisor writes them: there may be none."""
    path = run.folder / ATTEMPTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        run.attempts = [_mapping(json.loads(line)) for line in lines]
    except (OSError, ValueError) as error:
        run.problems.append(_what_happened(error, path))


def _read_traces(run: Run) -> None:
    for path in sorted((run.folder / profile.FOLDER).glob("rank-*.parts.json")):
        try:
            record = _mapping(json.loads(path.read_text(encoding="utf-8")))
            (first, last), rank = map(int, record["steps"]), int(record["rank"])
            parts = {name: float(ms) for name, ms in _mapping(record["milliseconds"]).items()}
            if parts:
                run.traces.append(Trace(rank, first, last, bool(record["on_gpu"]), parts))
        except (OSError, ValueError, TypeError, KeyError) as error:
            run.problems.append(_what_happened(error, path))


def _read_reports(run: Run) -> None:
    hangs = (run.folder / watchdog.FOLDER).glob(f"*/{watchdog.SUMMARY}")
    shortages = (run.folder / out_of_memory.FOLDER).glob("rank-*.txt")
    for title, paths in (("Hang", hangs), ("Out of memory", shortages)):
        for path in sorted(paths)[-_MOST_REPORTS:]:
            name = path.parent.name if path.name == watchdog.SUMMARY else path.stem
            try:
                text = path.read_text(encoding="utf-8", errors="replace")[:_MOST_TEXT]
                run.reports[f"{title}: {name}"] = text
            except OSError as error:
                run.problems.append(_what_happened(error, path))


def _what_happened(error: Exception, path: Path | None = None) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"{path}: damaged: {error}" if path else str(error)


class _Column:
    """A series as it grows; compact, since a long run has thousands of records."""

    def __init__(self) -> None:
        self._steps, self._values = array("q"), array("d")

    def add(self, step: int, value: Any) -> None:
        self._steps.append(step)
        self._values.append(_number(value))

    def series(self) -> Series:
        return Series.of(self._steps, self._values)


def _number(value: Any) -> float:
    """NaN for what is none: null, in the file, is a value that was not finite."""
    return float(value) if isinstance(value, int | float) else math.nan


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _load(value: Any) -> Load:
    """Without the sites that are not named, or not counted, as they should be."""
    load: Load = {}
    for name, counts in _mapping(value).items():
        try:
            array_GE = np.array(counts, dtype=np.float64)
        except (ValueError, TypeError):
            continue
        call = router_call_of(name)
        if call and array_GE.ndim == 2 and array_GE.size:
            load[call] = array_GE
    return load
