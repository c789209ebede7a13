"""Which source each global sample of a run comes from, as weights change and runs resume.

A run's mixture is a list of stages: weights, and the sample from which they apply. It is part of
the configuration's history, like excluded shards: a resumed run keeps the stages that it has
consumed, and continues with its own. A stage begins at the next multiple of the readers, and each
source continues where the earlier stages have left it, so none of its samples is skipped or
repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pydantic import JsonValue, TypeAdapter

from moa_dist.config.data import DataConfig
from moa_dist.data.interleaving import Interleaving


class Stage(NamedTuple):
    """Weights of all sources from some sample on, until the next stage."""

    since: int
    """First global sample that they are meant for."""
    weights: Mapping[str, float]
    """Source -> weight; one that is not named has none."""


Stages = tuple[Stage, ...]
"""Stages of a run, ordered by `since`, which is 0 in the first."""
_STAGES = TypeAdapter(Stages)


def configured_stages(data: DataConfig) -> Stages:
    """Return the stages of a run that begins with this configuration."""
    changes = {since for source in data.sources for since, _ in source.later_weights}
    return tuple(
        Stage(since, {source.label: source.weight_at(since) for source in data.sources})
        for since in sorted({0, *changes})
    )


def stages_as_json(stages: Stages) -> JsonValue:
    """Convert stages to JSON for a checkpoint; `read_stages` is the inverse."""
    return [[stage.since, dict(stage.weights)] for stage in stages]


def read_stages(value: JsonValue) -> Stages:
    """Read what `stages_as_json` wrote; None means that nothing was consumed."""
    return _STAGES.validate_python(value or ())


def continue_stages(past: Stages, sample: int, configured: Stages) -> Stages:
    """Return the stages of a run that continues at `sample` with the configured weights.

    Unchanged weights make no new stage.
    """
    if not past:
        return configured
    kept = tuple(stage for stage in past if stage.since < sample)
    current = [stage for stage in configured if stage.since <= sample][-1]
    later = tuple(stage for stage in configured if stage.since > sample)
    if not kept or kept[-1].weights != current.weights:
        kept = (*kept, Stage(sample, current.weights))
    return kept + later


class _Begun(NamedTuple):
    """A stage, and what the stages before it have consumed."""

    first: int
    """First sample of every reader that it applies to."""
    consumed: Sequence[Mapping[str, int]]
    """Reader -> source -> samples before that."""
    interleaving: Interleaving

    def after(self, reader: int, samples: int) -> dict[str, int]:
        """Return how many of a reader's first `samples` samples come from each source."""
        counts = dict(self.consumed[reader])
        for name, count in self.interleaving.counts(reader, samples - self.first).items():
            counts[name] = counts.get(name, 0) + count
        return counts


@dataclass(frozen=True)
class Mixture:
    """Maps each global sample to a source and its index there: a pure function of its fields.

    Sample i of a source is read by reader i mod M, like the global sample itself.
    """

    stages: Stages
    """Weights, and since when."""
    readers: int
    """Shards of each source that all ranks together read in parallel (M)."""

    def locate(self, sample: int) -> tuple[str, int]:
        """Return the source of a global sample, and its index in that source's own order."""
        turn, reader = divmod(sample, self.readers)
        stage = self._stage(turn)
        name, index = stage.interleaving.locate(reader, turn - stage.first)
        index += stage.consumed[reader].get(name, 0)
        return name, index * self.readers + reader

    def counts(self, samples: int) -> dict[str, int]:
        """Return how many of the first `samples` global samples come from each source."""
        total: dict[str, int] = {}
        for counts in self._consumed(samples):
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        return total

    def first_unread(self, samples: int) -> dict[str, int]:
        """Return the first sample of each source that is not among the first `samples`."""
        first: dict[str, int] = {}
        for reader, counts in enumerate(self._consumed(samples)):
            for name, count in counts.items():
                index = count * self.readers + reader
                first[name] = min(first.get(name, index), index)
        return first

    def _consumed(self, samples: int) -> Iterator[dict[str, int]]:
        """Yield for each reader its samples from each source, of the first `samples` of all."""
        turn, begun = divmod(samples, self.readers)
        stage = self._stage(turn)
        for reader in range(self.readers):
            yield stage.after(reader, turn + (reader < begun))

    def _stage(self, turn: int) -> _Begun:
        return next(stage for stage in reversed(self._begun) if stage.first <= turn)

    @cached_property
    def _begun(self) -> Sequence[_Begun]:
        nothing: Sequence[dict[str, int]] = [{} for _ in range(self.readers)]
        begun = [_Begun(0, nothing, Interleaving(self.stages[0].weights))]
        for stage in self.stages[1:]:
            first = -(-stage.since // self.readers)
            consumed = [begun[-1].after(reader, first) for reader in range(self.readers)]
            begun.append(_Begun(first, consumed, Interleaving(stage.weights)))
        return begun
