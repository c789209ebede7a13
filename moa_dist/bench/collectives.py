"""Section `collectives`: bandwidth between ranks, at the message sizes of this model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.bench.measure import Row, Table, Work, compare
from moa_dist.bench.setting import Setting
from moa_dist.bench.spawned_ranks import together
from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.distributed.mesh import Mesh

_SMALL = 16 * 2**10
"""Elements of a message small enough to measure latency."""


def collectives(setting: Setting, mesh: Mesh) -> list[Table]:
    """Time collectives over all ranks, in a table per size; rates count bytes sent per rank.

    Returns no table on a single rank.
    """
    if mesh.world_size == 1:
        return []
    return [
        _of_size(f"{name}, over {mesh.world_size} ranks", elements, setting, mesh)
        for name, elements in _sizes(setting).items()
    ]


def _sizes(setting: Setting) -> dict[str, int]:
    """Return elements per rank, by the meaning of the message."""
    model = setting.config.model
    sizes = {
        "latency": _SMALL,
        "rows of a micro-batch": setting.tokens * model.d_model,
    }
    if isinstance(model.ffn, MoEFFNConfig):
        experts = model.ffn.router.num_experts * model.ffn.d_expert
        sizes["one matrix of all FFN experts"] = experts * model.d_model
    return sizes


def _of_size(title: str, elements: int, setting: Setting, mesh: Mesh) -> Table:
    W = mesh.world_size
    whole = torch.ones(-(-elements // W) * W, device=setting.device, dtype=setting.dtype)
    part = whole[: len(whole) // W].clone()
    # Bytes that a rank must send: the parts of others; an all-reduce takes two such rounds.
    sent = (W - 1) * part.nbytes
    work: dict[str, tuple[Work, int]] = {
        "all-to-all": (_into(dist.all_to_all_single, torch.empty_like(whole), whole), sent),
        "all-gather": (_into(dist.all_gather_into_tensor, torch.empty_like(whole), part), sent),
        "reduce-scatter": (_into(dist.reduce_scatter_tensor, torch.empty_like(part), whole), sent),
        "all-reduce": (partial(dist.all_reduce, torch.zeros_like(whole)), 2 * sent),
        "nothing": (lambda: None, 0),
    }
    rows = compare(
        {name: together(once) for name, (once, _) in work.items()},
        setting.device,
        repetitions=setting.repetitions,
        memory=False,
    )
    rows = [replace(row, note=_rate(row, work[row.name][1])) for row in rows]
    return Table(f"{title}, {whole.nbytes / 2**20:,.2f} MiB", rows)


def _into(collective: Callable[[Tensor, Tensor], object], out: Tensor, x: Tensor) -> Work:
    return partial(collective, out, x)


def _rate(row: Row, sent: int) -> str:
    return (
        f"{sent / median(row.seconds) / 1e9:.2f} GB/s" if sent else "two barriers, as in every row"
    )
