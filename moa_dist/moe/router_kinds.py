"""The kinds of router: a new one is a section in `config/routers.py`, a module, and a line here."""

from __future__ import annotations

from moa_dist.config.family import (
    DenseTrainingRouterConfig,
    GShardRouterConfig,
    MLPRouterConfig,
    RecurrentRouterConfig,
    ReLURouterConfig,
    TaskRouterConfig,
    ThresholdRouterConfig,
)
from moa_dist.config.routers import RouterConfig
from moa_dist.moe.dense_training_router import DenseTrainingRouter
from moa_dist.moe.gshard_router import GShardRouter
from moa_dist.moe.initialize import Initializer
from moa_dist.moe.mlp_router import MLPRouter
from moa_dist.moe.recurrent_router import RecurrentRouter
from moa_dist.moe.relu_router import ReLURouter
from moa_dist.moe.router import Router
from moa_dist.moe.task_router import TaskRouter
from moa_dist.moe.threshold_router import ThresholdRouter

ROUTERS: dict[type[RouterConfig], type[Router]] = {
    DenseTrainingRouterConfig: DenseTrainingRouter,
    GShardRouterConfig: GShardRouter,
    MLPRouterConfig: MLPRouter,
    RecurrentRouterConfig: RecurrentRouter,
    ReLURouterConfig: ReLURouter,
    RouterConfig: Router,
    TaskRouterConfig: TaskRouter,
    ThresholdRouterConfig: ThresholdRouter,
}
"""Router module by section."""


def make_router(
    config: RouterConfig, d_model: int, *, num_groups: int = 1, init: Initializer | None = None
) -> Router:
    """Build the router that `config` describes, for rows of width `d_model`.

    `num_groups` routes each of so many heads separately; `init` draws the weights of its logits.
    """
    return ROUTERS[type(config)](config, d_model, num_groups=num_groups, init=init)
