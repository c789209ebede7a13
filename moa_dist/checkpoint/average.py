"""Averages a run's last checkpoints, which often beats each of them (Vaswani et al. 2017, 6.1).

Only parameters are averaged and moments are dropped, so the average can be evaluated, exported and
used to translate, but training cannot continue from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.convert import make_partial
from moa_dist.checkpoint.format import MASTER, Index, Piece, Reader, tokenizer_of
from moa_dist.checkpoint.tensor_file import TensorSpec, write_tensors
from moa_dist.checkpoint.write import move_into_place, seal
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError

_FILE = "average.safetensors"


def average(sources: Sequence[Path], target: Path) -> Index:
    """Write the mean of the checkpoints `sources`, of one run, to the new folder `target`.

    Sums are computed in fp64, holding one tensor of each checkpoint at a time. The index is that
    of the last checkpoint.

    Raises:
        DataError: there are no sources, one is damaged or of another model, or `target` exists.
    """
    if not sources:
        raise DataError(f"{target}: no checkpoint to average")
    for source in sources:
        require_valid(source)
    readers = [Reader(source) for source in sources]
    index = readers[-1].index
    for reader in readers:
        reader.check_shapes(index.shapes)
    partial = make_partial(target)
    specs = []
    for name, pieces in index.tensors.items():
        if name.rpartition("/")[2] == MASTER:
            numel = pieces[-1].start + pieces[-1].numel
            specs.append(TensorSpec(name, readers[-1].dtype(pieces[-1]), (numel,)))
    written = write_tensors(partial / _FILE, specs, _means(readers, specs))
    tensors = {spec.key: [Piece(_FILE, spec.key, 0, spec.shape[0])] for spec in specs}
    update = {"files": {_FILE: written.num_bytes}, "tensors": tensors}
    index = index.model_copy(update=update)
    seal(partial, index, {_FILE: written.sha256})
    if (tokenizer := tokenizer_of(sources[-1])).exists():
        shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
    move_into_place(partial, target)
    return index


def _means(readers: Sequence[Reader], specs: Sequence[TensorSpec]) -> Iterator[Tensor]:
    for name, dtype, shape in specs:
        total = torch.zeros(shape, dtype=torch.float64)
        for reader in readers:
            values = torch.empty(shape, dtype=dtype)
            reader.read_into(name, 0, values)
            total += values
        yield (total / len(readers)).to(dtype)
