"""Relatives of MoA and MoEUT take the same steps in any layout as on one process."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.layouts import (
    CAPACITY,
    MOA,
    Case,
    assert_equal,
    distributed,
    one_process,
    router,
)

FP64, FP32 = 1e-9, 1e-5
RELU = {"kind": "relu", "top_k": 2, "sparsity": 0.05}
POSITIONS = {"position": "sinusoidal"}
"""Without them equal tokens tie in the first layer, and rounding decides who is dropped."""
MLP = {
    "kind": "mlp",
    "d_hidden": 5,
    "top_k": 2,
    "score": "softmax",
    "balance": {"mutual_information": 0.1},
}
TANH = MLP | {"activation": "tanh", "gate_eps": 1e-6}
RECURRENT = {
    "kind": "recurrent",
    "d_state": 6,
    "top_k": 2,
    "score": "softmax",
    "gate": "renormalized",
    "balance": {"switch": 0.3, "pool_layers": True},
}
DENSE_TRAINING = {
    "kind": "dense_training",
    "top_k": 2,
    "score": "softmax",
    "balance": {"mutual_information": 0.1},
}
THRESHOLD = {
    "kind": "threshold",
    "num_heads": 2,
    "top_k": 2,
    "balance": {"mutual_information": 0.1},
}
TASK = {
    "kind": "task",
    "tasks": 3,
    "top_k": 2,
    "task_information": 0.5,
    "balance": {"scope": "global_batch"},
}
GSHARD = {"kind": "gshard", "top_k": 2, "first_choice": 0.1}
MOE = {"kind": "moe", "d_expert": 8, "router": router(5, 2, capacity=CAPACITY)}
FAMILY = {
    "remoe": {
        "attention": MOA | {"router": RELU | {"num_experts": 6, "max_experts": 4}},
        "ffn": {"kind": "moe", "d_expert": 8, "router": RELU | {"num_experts": 7}},
    },
    "moduleformer": {
        "attention": MOA
        | {
            "heads_per_expert": 2,
            "rope": None,
            "attend": "stick_breaking",
            "kv_bias": True,
            "router": MLP | {"num_experts": 5},
        },
        "ffn": {
            "kind": "moe",
            "d_expert": 8,
            "activation": "gelu",
            "router": MLP | {"num_experts": 7},
        },
    },
    "sut": {
        "num_distinct_layers": 1,
        "norm_placement": "post",
        "halting": {"kind": "stick_breaking", "threshold": 0.75, "loss": 0.3},
        "attention": MOA
        | {"rope": None, "relative_positions": 3, "router": TANH | {"num_experts": 5}},
        "ffn": {
            "kind": "moe",
            "d_expert": 8,
            "activation": "gelu",
            "bias": True,
            "router": TANH | {"num_experts": 7},
        },
    },
    "rmoe": {
        "attention": MOA | {"router": RECURRENT | {"num_experts": 5}},
        "ffn": {"kind": "moe", "d_expert": 8, "router": RECURRENT | {"num_experts": 7}},
    },
    "ds_moe": {
        "attention": MOA | {"router": DENSE_TRAINING | {"num_experts": 4}},
        "ffn": {"kind": "moe", "d_expert": 8, "router": DENSE_TRAINING | {"num_experts": 5}},
    },
    "moh": {
        "attention": {
            "kind": "moh",
            "num_shared_heads": 2,
            "d_head": 8,
            "bias": True,
            "router": router(5, 2, "softmax", gate="renormalized", balance={"switch": 0.1}),
        },
    },
    "monet": {
        "attention": MOA | {"router": THRESHOLD | {"num_experts": 6}},
        "ffn": {
            "kind": "monet",
            "decomposition": "horizontal",
            "d_expert": 6,
            "router": THRESHOLD | {"num_experts": 7},
        },
    },
    "monet_vertical": {
        "ffn": {
            "kind": "monet",
            "decomposition": "vertical",
            "d_expert": 8,
            "bias": True,
            "router": THRESHOLD | {"num_experts": 7, "num_heads": 3},
        },
    },
    "gshard": {
        "attention": MOA | {"router": GSHARD | {"num_experts": 5}},
        "ffn": {
            "kind": "residual_moe",
            "d_expert": 8,
            "d_ff": 12,
            "router": GSHARD | {"num_experts": 7, "capacity": {"factor": 0.75, "policy": "choice"}},
        },
    },
    "mod_squad": {
        "attention": MOA | {"kv_bias": True, "router": TASK | {"num_experts": 5}},
        "ffn": {"kind": "moe", "d_expert": 8, "router": TASK | {"num_experts": 7}},
    },
    "bam": {
        "attention": {
            "kind": "moh",
            "heads_per_expert": 2,
            "d_head": 8,
            "router": router(3, 3, "softmax"),
        },
        "ffn": {"kind": "moe", "d_expert": 8, "router": router(3, 2, "softmax")},
    },
    "dcmha": {"attention": {"kind": "composed", "num_heads": 3, "d_head": 8, "d_compose": 5}},
    "residual": {
        "ffn": {
            "kind": "residual_moe",
            "d_expert": 8,
            "d_ff": 12,
            "bias": True,
            "activation": "gelu",
            "router": router(7, 2, "softmax", capacity=CAPACITY, balance={"switch": 0.1}),
        },
    },
    "mor_expert": {
        "num_layers": 6,
        "recursion": {"kind": "expert_choice", "capacity": [0.9, 0.6, 0.3], "z_loss": 0.01},
        "ffn": MOE,
    },
    "mor_token": {
        "num_layers": 8,
        "prelude": 1,
        "coda": 1,
        "recursion": {
            "kind": "token_choice",
            "balance": {"switch": 0.1, "z_loss": 0.01, "bias_rate": 0.01},
        },
        "ffn": MOE,
    },
}
"""What the model of a `Case` is made of, by the name of the relative."""
LAYOUTS = {
    "W 2, tokens": Case(),
    "W 2, weights, accumulated": Case(exchange="weights", micro_batch=1),
    "W 2, recomputed": Case(recompute=True),
    "W 4, ep 2, ZeRO 1": Case(world_size=4, zero_stage=1, precision="fp32", micro_batch=1),
    "W 2, weights, ZeRO 2": Case(exchange="weights", zero_stage=2, precision="fp32"),
    "W 4, ep 2, ZeRO 3": Case(world_size=4, zero_stage=3, precision="fp32", micro_batch=2),
}


def cells() -> Iterator[Any]:
    """Yield all pairs of a relative and a layout; the default run takes two layouts of each."""
    for i, relative in enumerate(FAMILY):
        for j, layout in enumerate(LAYOUTS):
            is_default = (j - i) % 3 == 0
            marks = () if is_default else pytest.mark.full
            yield pytest.param(relative, layout, id=f"{relative}, {layout}", marks=marks)


@pytest.mark.parametrize(("relative", "layout"), list(cells()))
def test_steps_equal_one_process(pools, relative, layout):
    model = POSITIONS | FAMILY[relative]
    case = replace(LAYOUTS[layout], model=model, skewed=True, steps=2, lr=0.3)
    if relative == "mod_squad":  # a loss of all tokens of a step does not accumulate
        case = replace(case, micro_batch=case.sequences // case.world_size)
    bound = FP64 if case.precision == "fp64" else FP32
    assert_equal(distributed(pools, case), one_process(case), bound)
