"""Relatives of MoA and MoEUT take the same steps in any layout as on one process."""

from dataclasses import replace

import pytest

from tests.distributed.layouts import MOA, Case, assert_equal, distributed, one_process

FP64, FP32 = 1e-9, 1e-5
RELU = {"kind": "relu", "top_k": 2, "sparsity": 0.05}
MLP = {
    "kind": "mlp",
    "d_hidden": 5,
    "top_k": 2,
    "score": "softmax",
    "balance": {"mutual_information": 0.1},
}
FAMILY = {
    "remoe": {
        "position": "sinusoidal",
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


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("model", FAMILY.values(), ids=FAMILY.keys())
def test_steps_equal_one_process(pools, model, layout):
    case = replace(layout, model=model, skewed=True, steps=2, lr=0.3)
    bound = FP64 if layout.precision == "fp64" else FP32
    assert_equal(distributed(pools, case), one_process(case), bound)
