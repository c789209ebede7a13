"""Measures the forward and backward pass of a shipped configuration as a GPU would run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moa_dist.config import load_config
from moa_dist.models.documents import Documents
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.models.objective import Batch, objective
from tests.fake_cuda.launches import Launches, fake_cuda


class Measured(NamedTuple):
    """What one micro-batch costs."""

    launches: Launches
    """Kernels, bytes and waits of both passes."""
    saved: int
    """Bytes kept for the backward pass, without parameters and buffers."""


def bf16_model(
    path: str, *, recompute: bool = False, overrides: Sequence[str] = ()
) -> LanguageModel:
    """Build the model of a configuration as DeepSpeed trains it: parameters, not buffers, bf16."""
    model = meta_model(load_config(path, overrides).model, recompute=recompute)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


def micro_batch(
    model: LanguageModel, sequences: int, length: int, *, padded: bool, num_documents: int = 0
) -> Batch:
    """Make a batch of the meta device, with a mask if `padded`.

    Each sequence consists of `num_documents` of equal length, if any, which do not see each other.
    """
    tokens = torch.empty(sequences, length + 1, dtype=torch.int64, device="meta")
    mask = torch.empty_like(tokens, dtype=torch.bool) if padded else None
    batch = Batch(tokens, mask).with_tasks(tokens[:, 0], model.config.num_tasks)
    if num_documents:
        ids = (torch.arange(length) * num_documents // length).expand(sequences, -1)
        documents = Documents.from_ids(ids).moved(lambda part: part.to("meta"))
        return batch._replace(documents=documents)
    if model.encoder is None:
        return batch
    source_mask = None if mask is None else mask[:, 1:]
    return batch._replace(source=tokens[:, 1:], source_mask=source_mask)


def measure(
    path: str,
    sequences: int = 8,
    length: int = 1024,
    *,
    recompute: bool = False,
    padded: bool = False,
    num_documents: int = 0,
    overrides: Sequence[str] = (),
) -> Measured:
    """Run one micro-batch of `sequences` x `length` tokens forward and backward."""
    model = bf16_model(path, recompute=recompute, overrides=overrides)
    batch = micro_batch(model, sequences, length, padded=padded, num_documents=num_documents)
    kept_anyway = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in kept_anyway:
            kept[storage] = tensor
        return tensor

    with fake_cuda() as record:
        with record() as launches, saved_tensors_hooks(keep, lambda tensor: tensor):
            result = objective(model, batch)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        kept.clear()
        with launches:
            result.loss(float(sequences * length)).backward()
    return Measured(launches, saved)
