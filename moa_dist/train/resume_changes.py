"""What a run changes when it continues from a checkpoint: what is refused, and what follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

from pydantic import JsonValue

from moa_dist.checkpoint.format import Index
from moa_dist.config.changes import Change, Changes, changes, covers, refused
from moa_dist.config.run import Config, ScheduleConfig
from moa_dist.data.manifest import MANIFEST_FILE, sha256_of
from moa_dist.data.places import local_path
from moa_dist.train.schedule import learning_rate

DATA = "data.train"
"""Path of a change to other data, wherever they are."""
_ORDER = (DATA, "data.seed", "data.readers", "data.bucket_tokens")
_JUMP = 0.01
"""Relative change of the learning rate from which it is reported."""


def find_changes(before: Config, state: Mapping[str, JsonValue], config: Config) -> Changes:
    """List what `config` changes in a run whose checkpoint has this configuration and state.

    The same data may be elsewhere; other data at the same place are a change of `DATA`, and so are
    other sources, weights or tasks.
    """
    found = changes(before, config)
    is_same = (_mixture(before), _tasks(before)) == (_mixture(config), _tasks(config))
    if not replaced(state, config) and is_same:
        return found
    names = [c.model_dump(mode="json")["data"]["train"] for c in (before, config)]
    return Changes(
        [c for c in found.free if c.path != DATA], [*found.deciding, Change(DATA, *names)]
    )


def replaced(state: Mapping[str, JsonValue], config: Config) -> set[str]:
    """Return the sources that hold other data than those of the checkpoint with this state."""
    before, now = _data_ids(state), _current_ids(config)
    return {name for name in now if before.get(name, now[name]) != now[name]}


def _mixture(config: Config) -> dict[str, tuple[float, tuple[tuple[int, float], ...]]]:
    return {source.label: (source.weight, source.later_weights) for source in config.data.sources}


def _tasks(config: Config) -> dict[str, int | None]:
    return {source.label: source.task for source in config.data.sources}


def refusals(config: Config, newest: Index) -> list[str]:
    """Explain which changes need permission, a line each; empty if the run may continue."""
    found = find_changes(newest.config, newest.state, config)
    # A run that consists of weights has no optimizer state, and has read no data.
    deciding = found.deciding if newest.samples else found.under("model")
    problems = refused(deciding, config)
    if not problems:
        return []
    names = ",".join(change.path for change in problems)
    # A branch has a name of its own already.
    new_run = "start with `init.weights`" if config.init.branch else "choose another `name`"
    remedy = (
        f"set it back, {new_run}, or change it on purpose with 'checkpoint.allow_changes=[{names}]'"
    )
    *lines, last = [f"{change} makes {_what_it_makes(change)}" for change in problems]
    return [*lines, f"{last}; {remedy}"]


def _what_it_makes(change: Change) -> str:
    if covers("model", change.path):
        return "another model of the checkpoint's parameters"
    if change.path == DATA:
        return "a run on other data, in other shares or for other tasks, than the checkpoint's"
    if covers("data", change.path):
        return "another order of samples, which repeats some and skips others"
    return "another run than the checkpoint's"


def describe(found: Changes, before: Config, config: Config, step: int) -> Iterator[str]:
    """Name all changes of a run that continues after `step`, and what follows, a line each."""
    every = [*found.deciding, *found.free]
    if every:
        yield f"changed since step {step}: {', '.join(map(str, every))}"
    if not 0 < step < config.train.steps:
        return
    yield from _learning_rate(before, config, step)
    paths = {change.path for change in found.deciding} & set(_ORDER)
    if DATA in paths and _mixture(before) != _mixture(config):
        yield "sources are mixed by the new weights from here on; each continues where it was"
        paths.discard(DATA)
    if paths:
        yield "the order of samples is another: some may be repeated, and others skipped"
    if before.optimizer.kind != config.optimizer.kind:
        yield f"{config.optimizer.kind} begins with moments of zero"


def _learning_rate(before: Config, config: Config, step: int) -> Iterator[str]:
    old, new = (_rate(c, step) for c in (before, config))
    if not math.isclose(old, new, rel_tol=_JUMP):
        yield (
            f"the learning rate jumps from {old:.2e} at step {step} to "
            f"{_rate(config, step + 1):.2e} at step {step + 1}"
        )
    ends = before.train.steps, config.train.steps
    if ends[0] != ends[1] and (moved := _moved_with_the_end(config.schedule)):
        yield f"{moved} of the learning rate ends at step {ends[1]} instead of {ends[0]}"


def _moved_with_the_end(schedule: ScheduleConfig) -> str | None:
    """Name the part of a schedule that depends on `train.steps`; None if nothing does."""
    match schedule.kind:
        case "cosine":
            return "the cosine"
        case "wsd":
            return "the decay"
        case "phases" if any(phase.steps is None for phase in schedule.phases):
            return "the last phase"
    return None


def _rate(config: Config, step: int) -> float:
    return learning_rate(step, config.optimizer.lr, config.schedule, config.train.steps)


class History(NamedTuple):
    """What the resumptions of a run have changed; part of the state of its checkpoints."""

    changes: list[JsonValue]
    """All changes, in order: `step` that they follow, `path`, `before` and `after`."""
    data: dict[str, JsonValue]
    """Source -> checksum of its manifest, which identifies its data."""

    @staticmethod
    def after(state: Mapping[str, JsonValue], found: Changes, step: int, config: Config) -> History:
        """Extend the history in the state of the checkpoint of `step` by what was found."""
        past = cast(list[JsonValue], state.get("changes", []))
        new: list[JsonValue] = [
            {"step": step, **change._asdict()} for change in (*found.deciding, *found.free)
        ]
        return History([*past, *new], {**_data_ids(state), **_current_ids(config)})

    def state(self) -> dict[str, JsonValue]:
        """Return what a checkpoint keeps."""
        return {"changes": self.changes, "data": self.data}


def _data_ids(state: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return cast(dict[str, JsonValue], state.get("data", {}))


def _current_ids(config: Config) -> dict[str, JsonValue]:
    return {
        source.label: sha256_of((local_path(config.data, source) / MANIFEST_FILE).read_bytes())
        for source in config.data.sources
    }
