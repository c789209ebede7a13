"""Builds a sharded model and its engine, for training, checks and benchmarks."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from moa_dist.config.run import Config, ExpertExchangeConfig
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.distributed.device import (
    keep_freed_memory,
    min_device_memory,
    set_product_precision,
    should_overlap,
)
from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.errors import ConfigError, Problem
from moa_dist.models.counts import Counts, count_model
from moa_dist.models.language_model import LanguageModel, materialize, meta_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.exchange_choice import Decision, decide_exchange
from moa_dist.train.engine import Engine


class Built(NamedTuple):
    """A run's engine, and what was found on the way to it."""

    engine: Engine
    counts: Counts
    """Size and work of the whole model."""
    decision: Decision
    """Whether tokens or weights are exchanged, and why."""
    overlap: bool
    """Whether they are while other things are computed."""


def build_as_configured(config: Config, device: torch.device, backend: str) -> Built:
    """Decide what `config` leaves open, and build the engine. Collective.

    `backend` is the communication backend of the job that is to run.
    """
    set_product_precision(config.train.precision)
    keep_freed_memory(device)
    mesh = make_mesh(config.parallel.expert_parallel)
    model = meta_model(config.model, recompute=config.train.recompute)
    counts = count_model(model, config.data.sequence_length)
    decision = decide_exchange(config, mesh.world_size, min_device_memory(device), model)
    overlap = should_overlap(config.parallel.overlap, backend)
    engine = build_engine(config, mesh, device, decision.exchange, overlap=overlap, model=model)
    return Built(engine, counts, decision, overlap)


def build_engine(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    exchange: ExpertExchangeConfig,
    *,
    overlap: bool,
    model: LanguageModel | None = None,
    zero_sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> Engine:
    """Build the engine around the initial model of `config`. Collective.

    `exchange` holds no `auto`, see `decide_exchange`. With `overlap`, experts' tokens or
    weights are exchanged while other things are computed. `model`, if given, is that of
    `config` on the meta device; it becomes the engine's.
    """
    if model is None:
        model = meta_model(config.model, recompute=config.train.recompute)
    shard = partial(shard_experts, mesh=mesh, exchange=exchange, overlap=overlap)
    model = materialize(model, config.train.seed, shard)
    if config.train.compile:
        _refuse_tokens(config, exchange)
        model.compile_blocks()
    return Engine(model, config, mesh, device, zero_sizes)


def _refuse_tokens(config: Config, exchange: ExpertExchangeConfig) -> None:
    """Raise ConfigError where `auto` has chosen an exchange that cannot be compiled."""
    for part in config.model.routed_parts():
        if getattr(exchange, part) == "tokens" and config.parallel.expert_parallel > 1:
            key = f"parallel.expert_exchange.{part}"
            text = f"`{key}` auto has chosen tokens, with which `train.compile` does not work"
            raise ConfigError([Problem(text, ("train.compile", key), {key: ("weights",)})])
