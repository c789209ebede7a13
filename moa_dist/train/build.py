"""A model sharded over ranks, in its engine: as training, checks and benchmarks begin."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from moa_dist.config.run import Config, ExpertExchangeConfig
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.distributed.device import min_device_memory, should_overlap
from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.exchange_choice import Decision, decide_exchange
from moa_dist.train.engine import Engine


class Built(NamedTuple):
    """A run's engine, and what was decided on the way to it."""

    engine: Engine
    decision: Decision
    """Whether tokens or weights are exchanged, and why."""
    overlap: bool
    """Whether they are while other things are computed."""


def build_as_configured(config: Config, device: torch.device, backend: str) -> Built:
    """Decide what `config` leaves open, and build the engine. Collective.

    `backend` is the communication backend of the job that is to run.
    """
    mesh = make_mesh(config.parallel.expert_parallel)
    decision = decide_exchange(config, mesh.world_size, min_device_memory(device))
    overlap = should_overlap(config.parallel.overlap, backend)
    engine = build_engine(config, mesh, device, decision.exchange, overlap=overlap)
    return Built(engine, decision, overlap)


def build_engine(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    exchange: ExpertExchangeConfig,
    *,
    overlap: bool,
    zero_sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> Engine:
    """The engine of the initial model of `config`. Collective.

    `exchange` holds no `auto`: `decide_exchange` has decided. With `overlap`, experts' tokens or
    weights are exchanged while other things are computed.
    """
    model = build_model(
        config.model,
        seed=config.train.seed,
        recompute=config.train.recompute,
        parallelize=partial(shard_experts, mesh=mesh, exchange=exchange, overlap=overlap),
    )
    return Engine(model, config, mesh, device, zero_sizes)
