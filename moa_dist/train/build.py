"""A model sharded over ranks, in its engine: as training, checks and benchmarks begin."""

from __future__ import annotations

from functools import partial

import torch

from moa_dist.config.run import Config, ExpertExchangeConfig
from moa_dist.distributed.mesh import Mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.deepspeed_config import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.train.engine import Engine


def build_engine(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    exchange: ExpertExchangeConfig,
    *,
    overlap: bool,
    zero_sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> Engine:
    """The initial model of `config`. Collective over all ranks.

    What travels has been decided, by `decide_exchange`: `exchange` holds no `auto`; with `overlap`
    it does so beside computation.
    """
    model = build_model(
        config.model,
        seed=config.train.seed,
        recompute=config.train.recompute,
        parallelize=partial(shard_experts, mesh=mesh, exchange=exchange, overlap=overlap),
    )
    return Engine(model, config, mesh, device, zero_sizes)
