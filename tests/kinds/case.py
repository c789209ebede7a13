"""The kinds of `tests/kinds/toy.py` while a test runs, and a configuration made of them."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from moa_dist.config import Config
from moa_dist.config.attention import AttentionConfig
from moa_dist.config.feed_forward import FFNConfig
from moa_dist.config.routers import RouterConfig
from moa_dist.models.kinds import ATTENTION, FEED_FORWARD
from moa_dist.moe.router_kinds import ROUTERS

TOY = "tests.kinds.toy"
VOCABULARY, D_MODEL, LAYERS = 270, 16, 2
D_HEAD, D_FF, D_HIDDEN = 4, 24, 5
HEADS, EXPERTS, TOP_K = 6, 7, 2
ROUTER = {"kind": "toy_tanh", "d_hidden": D_HIDDEN, "top_k": TOP_K, "score": "sigmoid"}


@pytest.fixture
def toy() -> Iterator[ModuleType]:
    """The kinds, known while a test runs."""
    families = (AttentionConfig.kinds, FFNConfig.kinds, RouterConfig.kinds)
    lists = (ATTENTION, FEED_FORWARD, ROUTERS)
    before = [dict(known) for known in (*families, *lists)]
    yield importlib.import_module(TOY)
    del sys.modules[TOY]
    for known, kept in zip((*families, *lists), before, strict=True):
        known.clear()
        known.update(kept)


def model_section(**router: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": D_MODEL,
        "num_layers": LAYERS,
        "norm_placement": "peri",
        "attention": {
            "kind": "toy_heads",
            "d_head": D_HEAD,
            "router": ROUTER | {"num_experts": HEADS} | router,
        },
        "ffn": {
            "kind": "toy_linear",
            "d_ff": D_FF,
            "router": ROUTER | {"num_experts": EXPERTS} | router,
        },
    }


def config_of(expert_parallel: int = 1, exchange: str = "tokens", zero_stage: int = 1) -> Config:
    return Config.model_validate(
        {
            "name": "toy",
            "model": model_section(balance={"entropy": 0.1}),
            "data": {"train": "none", "sequence_length": 16},
            "train": {"steps": 2, "global_batch": 8, "micro_batch": 2},
            "parallel": {
                "expert_parallel": expert_parallel,
                "zero_stage": zero_stage,
                "expert_exchange": {"attention": exchange, "ffn": exchange},
            },
        }
    )
