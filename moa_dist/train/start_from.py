"""What a new run starts from: the weights of another run, or its whole state (see `InitConfig`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from moa_dist.checkpoint.agreement import gather
from moa_dist.checkpoint.check import altered, damage, read_sums
from moa_dist.checkpoint.format import MASTER, Reader, tokenizer_of
from moa_dist.checkpoint.state_source import StateSource
from moa_dist.config.run import Config, InitConfig
from moa_dist.data.manifest import sha256_of
from moa_dist.data.places import local_path
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError
from moa_dist.evaluate.export import ExportedWeights, is_export
from moa_dist.evaluate.trained import find_checkpoint

Shapes = Mapping[str, tuple[int, ...]]
_NAMED = 5
"""Most parameters that a message names."""


class SavedWeights(Protocol):
    """Weights on disk, whole or in pieces."""

    @property
    def shapes(self) -> Shapes:
        """Shape of every parameter and buffer, by name."""

    def read_into(self, name: str, start: int, view: Tensor) -> None:
        """Fill the 1-D `view` with elements of a parameter from `start` on."""


class _CheckpointWeights:
    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self.shapes: Shapes = self._reader.index.shapes

    def read_into(self, name: str, start: int, view: Tensor) -> None:
        self._reader.read_into(f"{name}/{MASTER}", start, view)


def load_weights(source: StateSource, config: Config) -> list[str]:
    """Overwrite a new run's weights by those of `config.init.weights`. Collective.

    Returns what to report. Raises DataError, alike on every rank, if the saved weights are damaged,
    do not fit the model apart from what `config.init` names, or belong to another tokenizer.
    """
    assert config.init.weights is not None
    path = Path(config.init.weights)
    folder = path if is_export(path) else find_checkpoint(path)
    _require_undamaged(folder)
    weights: SavedWeights
    weights = ExportedWeights(folder) if is_export(folder) else _CheckpointWeights(folder)
    shapes = source.global_shapes()
    new = _new_parameters(shapes, weights.shapes, config.init, folder)
    if "embedding.weight" not in new:  # a new embedding learns the ids of any tokenizer
        _require_same_tokenizer(folder, local_path(config.data, config.data.sources[0]))
    for fragment in source.fragments(owned_only=False):
        if fragment.state == MASTER and fragment.parameter not in new:
            weights.read_into(fragment.parameter, fragment.start, fragment.view)
    source.publish_masters()
    unused = sorted(weights.shapes.keys() - shapes)
    return [
        f"starting from the weights of {folder}",
        *([f"with initial weights: {_some(sorted(new))}"] if new else []),
        *([f"weights without use: {_some(unused)}"] if unused else []),
    ]


def _new_parameters(shapes: Shapes, saved: Shapes, init: InitConfig, folder: Path) -> set[str]:
    """Return the parameters that keep their initial weights; raises DataError if others differ."""
    new = {name for name, shape in shapes.items() if _matches(name, init.new)}
    missing = sorted(name for name in shapes.keys() - new if saved.get(name) != shapes[name])
    unused = sorted(n for n in saved.keys() - shapes.keys() if not _matches(n, init.unused))
    if missing:
        name = missing[0]
        raise DataError(
            f"{folder}: {len(missing)} parameters of this model differ or are not there: "
            f"{_some(missing)}; {name} is {saved.get(name, 'missing')} there and {shapes[name]} "
            "here. Name those that may start with initial weights in `init.new`",
            path=folder,
            key=name,
        )
    if unused:
        raise DataError(
            f"{folder}: {len(unused)} parameters have no place in this model: {_some(unused)}. Use "
            "the model that they belong to, or name them in `init.unused`",
            path=folder,
            key=unused[0],
        )
    for field in ("new", "unused"):
        for pattern in getattr(init, field):
            if not _matches_any(pattern, shapes if field == "new" else saved):
                raise DataError(
                    f"`init.{field}` names {pattern}, which matches no parameter",
                    path=folder,
                    key=f"init.{field}",
                )
    return new


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _require_undamaged(folder: Path) -> None:
    """Check all files, divided among the ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if is_export(folder):
        sums = sorted(read_sums(folder).items())
        own = list(altered(folder, dict(sums[rank::world_size])))
    else:
        own = damage(folder, rank, world_size)
    problems = [problem for found in gather(own) for problem in found]
    if problems:
        raise DataError(f"{folder} is damaged: {problems[0]}; use a copy", path=folder)


def _require_same_tokenizer(folder: Path, data: Path) -> None:
    """Raise DataError if the weights were trained on the ids of another tokenizer."""
    theirs = folder / TOKENIZER_FILE if is_export(folder) else tokenizer_of(folder)
    ours = data / TOKENIZER_FILE
    if theirs.exists() and ours.exists() and _sum(theirs) != _sum(ours):
        raise DataError(
            f"{folder} was trained with another tokenizer than {data}; prepare the text with "
            f"`--tokenizer {theirs}`, or name embedding.weight, and the head, in `init.new`",
            path=theirs,
            key="init.weights",
        )


def _sum(path: Path) -> str:
    return sha256_of(path.read_bytes())
