"""Sends the curves of a run to an experiment tracker, in a thread of its own.

Training never waits for a tracker, and goes on without one: what a server does not take is kept and
sent again with the next record, until the run ends.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from moa_dist.errors import Problem
from moa_dist.observe.metrics import RunStart, SampleMetrics, StepMetrics, ValidationMetrics
from moa_dist.observe.scalars import step_values, validation_values

FOLDER = "trackers"
"""Folder within the run's: the id of the run in each tracker."""
OPTIONAL = ("wandb", "mlflow")
"""Trackers that need a module of their name, which an extra of that name installs."""
_MOST_KEPT = 10_000
"""Most records that wait for a server."""
_CLOSING_S = 20.0
"""Longest time that the end of training waits for a server."""


class Point(NamedTuple):
    """Values of one step."""

    step: int
    time: float
    """Seconds since 1970."""
    values: dict[str, float]


@dataclass
class Identity:
    """The run as a tracker knows it; kept in the run's folder, so that a resumed run goes on."""

    path: Path
    run: str
    """Name of the run; a copied folder with another one is another run."""
    id: str | None = None
    """None for a run that the tracker does not know."""
    last_step: int = 0
    """Last step that may have been sent."""

    @staticmethod
    def read(run: RunStart, tracker: str) -> Identity:
        """Read what an earlier attempt has left, if anything."""
        new = Identity(Path(run.folder) / FOLDER / f"{tracker}.json", run.config.name)
        try:
            saved = json.loads(new.path.read_text(encoding="utf-8"))
            if saved["run"] != new.run:
                return new
            return Identity(new.path, new.run, str(saved["id"]), int(saved["last_step"]))
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
            return new

    def set(self, id: str, last_step: int) -> None:
        """Change both, also on disk."""
        self.id, self.last_step = id, last_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        saved = {"run": self.run, "id": id, "last_step": last_step}
        new.write_text(json.dumps(saved), encoding="utf-8")
        new.replace(self.path)


class Store(Protocol):
    """What a tracker keeps of a run.

    Methods may block, and raise what the tracker's library does; one that raises is called again.
    """

    def open(self, run: RunStart) -> Iterator[str]:
        """Begin or continue the run, without points after `run.first_step`; yields notes."""

    def log(self, point: Point) -> None:
        """Add a point; several of one step have different names."""

    def log_samples(self, metrics: SampleMetrics) -> None:
        """Add texts that the model continued."""

    def rewind(self, step: int) -> Iterator[str]:
        """Discard all points after `step`; yields notes."""

    def close(self) -> None:
        """Write what is buffered, and end the run."""


class Tracker:
    """An observer that forwards all values to a store."""

    def __init__(self, name: str, store: Store) -> None:
        self._name, self._store = name, store
        self._run: RunStart | None = None
        self._jobs: queue.SimpleQueue[Callable[[], Iterator[str] | None] | None]
        self._jobs = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._problem = ""

    def start(self, run: RunStart) -> None:
        """Open the run."""
        self._run = run
        self._thread.start()
        self._jobs.put(partial(self._store.open, run))

    def step(self, metrics: StepMetrics) -> None:
        """Add the values of a step."""
        assert self._run is not None, "start comes first"
        self._add(metrics.step, step_values(self._run, metrics))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Add the values of a validation."""
        self._add(metrics.step, validation_values(metrics))

    def samples(self, metrics: SampleMetrics) -> None:
        """Add continued texts."""
        self._jobs.put(partial(self._store.log_samples, metrics))

    def rewind(self, step: int) -> None:
        """Discard all points after this step."""
        self._jobs.put(partial(self._store.rewind, step))

    def note(self, message: str) -> None:
        """Do nothing: trackers show curves, not messages."""

    def close(self) -> None:
        """Wait until everything is sent, but not for long."""
        if self._run is None:
            return
        self._jobs.put(self._store.close)
        self._jobs.put(None)
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive() and not self._problem:
            self._notes.put(f"{self._name}: the last reports were not sent within {_CLOSING_S:g} s")

    def take_notes(self) -> Iterator[str]:
        """Return what a person should know, a line each, once."""
        while not self._notes.empty():
            yield self._notes.get()

    def _add(self, step: int, values: dict[str, float]) -> None:
        self._jobs.put(partial(self._store.log, Point(step, time.time(), values)))

    def _work(self) -> None:
        """Do all jobs in order; one that fails is tried again when the next one arrives."""
        left: deque[Callable[[], Iterator[str] | None]] = deque()
        while (job := self._jobs.get()) is not None:
            if len(left) < _MOST_KEPT:
                left.append(job)
            try:
                while left:
                    for note in left[0]() or ():
                        self._notes.put(note)
                    left.popleft()
            except Exception as error:
                # Whatever a tracker's library raises must not end training.
                problem = " ".join(str(error).split())[:200] or repr(error)
                if not self._problem:
                    self._notes.put(
                        f"{self._name}: {problem}; training continues, and later reports try again"
                    )
                self._problem = problem


def missing_packages(trackers: tuple[str, ...]) -> Iterator[Problem]:
    """Describe each tracker whose package is not installed, and how to install it."""
    for name in trackers:
        if name in OPTIONAL and not _is_installed(name):
            remedy = f"run `pip install 'moa-dist[{name}]'`"
            text = f"`logging.trackers` has {name}, which is not installed: {remedy}"
            yield Problem(text, ("logging.trackers",))


def _is_installed(module: str) -> bool:
    """Whether a module can be imported, other than the folder that its library writes to."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
