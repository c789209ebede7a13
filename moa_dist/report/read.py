"""Reads a run's folder into values; what is missing or damaged becomes a problem to show."""

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
from moa_dist.models.calls import RouterCall
from moa_dist.observe.jsonl import FILE_NAME, read_metrics
from moa_dist.observe.metrics import RouterSize
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
    "tokens_read",
    "samples",
    "step_seconds",
    "communication_share",
)
"""Names of scalars in the record of a step."""
_VALIDATION = ("loss", "perplexity", "bits_per_byte")
SOURCE_SHARE, SOURCE_EPOCHS = "sources/share/", "sources/epochs/"
"""Begin the names of series about a source of training data, which its own name ends."""
FOLDER_LOSS = "validation/losses/"
"""Begins the name of the series of losses on one folder of held-out data."""

Load = dict[RouterCall, NDArray[np.float64]]
"""Assignments [G, E] by router application: G router groups, E experts each."""


@dataclass(frozen=True)
class Note:
    """One message that the run recorded."""

    step: int
    """Last step reported before the note."""
    message: str


@dataclass(frozen=True)
class Trace:
    """Where the time of traced steps went on one rank."""

    rank: int
    first: int
    """First traced step."""
    last: int
    """Last traced step."""
    on_gpu: bool
    """Whether times are those of GPU kernels instead of the main thread."""
    parts: dict[str, float]
    """Milliseconds per step, by part."""


@dataclass
class Run:
    """Everything known about a run."""

    folder: Path
    """Folder that was read."""
    config: dict[str, Any] = field(default_factory=dict)
    """Configuration, not validated: another version may have written it."""
    config_text: str = ""
    """Configuration as YAML."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Record of the last start: sizes, device, ranks."""
    starts: list[int] = field(default_factory=list)
    """Steps after which training started or resumed."""
    series: dict[str, Series] = field(default_factory=dict)
    """By name: `loss`, `validation/loss`, `validation/losses/FOLDER`, `aux_losses/NAME`,
    `token_means/NAME`, `tasks/NAME`, `parts/NORM/PART`, `sources/share/SOURCE`,
    `traffic/PURPOSE/LAYER` in MiB, `elapsed` in seconds without the time between attempts, ..."""
    routing: dict[str, dict[RouterCall, Series]] = field(default_factory=dict)
    """Series of each router application, by measure, such as `drop_share`."""
    loads: list[tuple[int, Load]] = field(default_factory=list)
    """First and last expert loads that were recorded, with their steps."""
    slowest: list[str] = field(default_factory=list)
    """The rank with most work in each report, such as `rank 3 (node-1)`."""
    traces: list[Trace] = field(default_factory=list)
    """Traced step times, sorted by rank."""
    reports: dict[str, str] = field(default_factory=dict)
    """Text of reports about hangs and memory shortages, by name."""
    notes: list[Note] = field(default_factory=list)
    """Notes in the order in which they were recorded."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """What the supervisor recorded about each attempt."""
    checkpoints: list[Index] = field(default_factory=list)
    """Indices of checkpoints, oldest first."""
    analysis: Analysis | None = None
    """Result of `moa-dist analyze`, if it was run."""
    updated: float | None = None
    """When the last record was written, in seconds since 1970, if known."""
    problems: list[str] = field(default_factory=list)
    """Parts of the run that could not be read, and why."""

    @property
    def name(self) -> str:
        """The configured name, or else the folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    def setting(self, path: str) -> Any:
        """Return a setting by its path, such as `train.steps`; None if it is absent."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def router_size(self, router: str) -> RouterSize | None:
        """Return the sizes of the routers of this name, if the run recorded them."""
        sizes = _mapping(_mapping(self.facts.get("routers")).get(router))
        values = [sizes.get(name) for name in RouterSize._fields]
        known = [value for value in values if isinstance(value, int) and value > 0]
        return RouterSize(*known) if len(known) == len(values) else None

    def group(self, prefix: str) -> dict[str, Series]:
        """Return the series whose names begin with `prefix`, by the rest of their names."""
        return {
            name.removeprefix(prefix): series
            for name, series in self.series.items()
            if name.startswith(prefix)
        }


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises DataError if it has neither metrics nor a configuration nor checkpoints.
    """
    found = checkpoints(folder)
    if not found and not any((folder / name).exists() for name in (FILE_NAME, CONFIG_FILE)):
        raise DataError(
            f"{folder}: not a run: no {FILE_NAME}, {CONFIG_FILE} or checkpoint; pass the folder "
            "that training wrote, such as runs/NAME"
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
    elapsed = _Stopwatch()
    routing: dict[str, dict[RouterCall, _Column]] = defaultdict(lambda: defaultdict(_Column))
    try:
        for record in read_metrics(run.folder / FILE_NAME):
            kind, step = record["kind"], record["step"]
            elapsed.pass_to(record.get("time"), is_start=kind == "start")
            if kind == "start":
                run.starts.append(step)
                run.facts = record
                columns["elapsed"].add(step, elapsed.seconds)
                run.config = _mapping(record.get("config"))
            elif kind == "note":
                run.notes.append(Note(step, str(record.get("message"))))
            elif kind == "step":
                if slowest := _mapping(record.get("slowest")):
                    run.slowest.append(f"rank {slowest.get('rank')} ({slowest.get('host')})")
                columns["elapsed"].add(step, elapsed.seconds)
                for name, value in _step_values(record):
                    columns[name].add(step, value)
                for name, summary in _mapping(record.get("routing")).items():
                    if call := router_call_of(name):
                        for measure, value in _mapping(summary).items():
                            routing[measure][call].add(step, value)
            elif kind == "validation":
                for name in _VALIDATION:
                    columns[f"validation/{name}"].add(step, record.get(name))
                for name, value in _mapping(record.get("losses")).items():
                    columns[f"{FOLDER_LOSS}{name}"].add(step, value)
                for name, value in _mapping(record.get("tasks")).items():
                    columns[f"tasks/{name}"].add(step, value)
                if load := _load(record.get("load")):
                    # The page shows only the first and the last.
                    run.loads = [*run.loads[:1], (step, load)]
    except (OSError, DataError) as error:
        run.problems.append(_what_happened(error))
    run.updated = None if math.isnan(elapsed.last) else elapsed.last
    run.series = {name: column.series() for name, column in columns.items()}
    run.routing = {
        measure: {call: column.series() for call, column in sorted(calls.items())}
        for measure, calls in routing.items()
    }


def _step_values(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _SCALARS:
        yield name, record.get(name)
    for group in ("aux_losses", "gpu", "token_means"):
        for name, value in _mapping(record.get(group)).items():
            yield f"{group}/{name}", value
    for part, norms in _mapping(record.get("parts")).items():
        for name, value in _mapping(norms).items():
            yield f"parts/{name}/{part}", value
    for name, read in _mapping(record.get("sources")).items():
        yield f"{SOURCE_SHARE}{name}", _mapping(read).get("share")
        yield f"{SOURCE_EPOCHS}{name}", _mapping(read).get("epochs")
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
    """Read the attempts that a supervisor recorded; without one there is no file."""
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


class _Stopwatch:
    """Adds up the time between records, without that between attempts; NaN if one has none."""

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, math.nan

    def pass_to(self, time: Any, *, is_start: bool) -> None:
        now = _number(time)
        if math.isnan(now):
            self.seconds = math.nan
        elif not is_start:
            self.seconds += max(now - self.last, 0.0)
        self.last = now


class _Column:
    """A growing series, stored compactly since a long run has thousands of records."""

    def __init__(self) -> None:
        self._steps, self._values = array("q"), array("d")

    def add(self, step: int, value: Any) -> None:
        self._steps.append(step)
        self._values.append(_number(value))

    def series(self) -> Series:
        return Series.of(self._steps, self._values)


def _number(value: Any) -> float:
    """Return a number, or NaN for anything else: the file has null for values not finite."""
    return float(value) if isinstance(value, int | float) else math.nan


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _load(value: Any) -> Load:
    """Return the loads, without entries whose names or counts are malformed."""
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
