"""What saves memory takes the same step as one process: a matrix of its own, over all layouts.

Parts that are recomputed, and an optimizer in host memory, meet every value of every dimension, and
one another. Sequences are padded and every rank has its own.
"""

from itertools import product
from typing import Any

import pytest

from tests.cover import Cell, covering
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, assert_equal, distributed, one_process
from tests.distributed.layouts import router as router_config
from tests.distributed.test_engine import FP32, FP64, stage

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "recompute": (
        False,
        ("attention",),
        ("ffn",),
        ("experts",),
        ("attention", "experts"),
        ("ffn", "experts"),
        ("attention", "ffn"),
    ),
    "offload": ("none", "host"),
    "layout": ((1, 1), (2, 1), (2, 2), (4, 2)),
    "zero_stage": (0, 1, 2, 3),
    "exchange": ("tokens", "weights"),
    "layers": ("distinct", "shared"),
    "attention": ("moa", "switchhead"),
    "optimizer": ("sgd", "adamw"),
}
CELLS = [
    cell
    for values in product(*DIMENSIONS.values())
    for cell in [dict(zip(DIMENSIONS, values, strict=True))]
    if not (cell["offload"] == "host" and cell["zero_stage"] == 0)
]
CHOSEN = covering(CELLS)


def name_of(i: int) -> str:
    return " ".join(str(value).replace(" ", "") for value in CELLS[i].values())


def case_of(cell: Cell) -> Case:
    balance = {"entropy": 0.1, "z_loss": 0.01}
    attention = {"moa": MOA, "switchhead": SWITCHHEAD}[cell["attention"]]
    world_size, expert_parallel = cell["layout"]
    return Case(
        **stage(cell["zero_stage"]),
        **{name: cell[name] for name in ("recompute", "offload", "exchange", "optimizer")},
        world_size=world_size,
        expert_parallel=expert_parallel,
        micro_batch=4 // world_size,
        clip_norm=0.1,
        eps=1e-3,
        model={
            "num_layers": 2,
            "num_distinct_layers": 1 if cell["layers"] == "shared" else 2,
            "attention": attention | {"router": router_config(5, 2, "softmax", balance=balance)},
            "ffn": {
                "kind": "moe",
                "d_expert": 8,
                "gated": True,
                "router": router_config(7, 3, balance=balance),
            },
        },
    )


@pytest.mark.parametrize("i", CHOSEN, ids=name_of)
def test_step_equals_one_process(pools, i):
    case = case_of(CELLS[i])
    bound = FP64 if case.zero_stage == 0 else FP32
    assert_equal(distributed(pools, case), one_process(case), bound)
