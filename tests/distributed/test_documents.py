"""Documents that do not see each other: any layout takes the step of one process."""

from itertools import product

import pytest

from tests.cover import covering
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, assert_equal, distributed, one_process
from tests.distributed.layouts import router as router_config

FP64, FP32 = 1e-9, 1e-5
ATTENTION = {
    "dense": {"kind": "dense", "num_heads": 2, "d_head": 8},
    "moa": MOA | {"router": router_config(5, 2, "softmax", balance={"mutual_information": 0.1})},
    "switchhead": SWITCHHEAD | {"router": router_config(3, 2, balance={"entropy": 0.1})},
}
DIMENSIONS = {
    "layout": ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)),  # W, ep
    "zero_stage": (0, 1, 2, 3),
    "exchange": ("tokens", "weights"),
    "recompute": (False, True),
    "attention": tuple(ATTENTION),
    "objective": ("causal", "masked"),
}
PRODUCT = [dict(zip(DIMENSIONS, values, strict=True)) for values in product(*DIMENSIONS.values())]
CELLS = [PRODUCT[i] for i in covering(PRODUCT)]
"""They hold every pair of values."""
BY_DEFAULT = covering(CELLS, strength=1)
"""These hold every value."""


def name_of(cell):
    (world_size, ep), *others = cell.values()
    return f"W{world_size} ep{ep} ZeRO" + " ".join(map(str, others))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=name_of(cell), marks=[] if i in BY_DEFAULT else pytest.mark.full)
        for i, cell in enumerate(CELLS)
    ],
)
def test_step_equals_one_process(pools, cell):
    world_size, expert_parallel = cell["layout"]
    case = Case(
        world_size=world_size,
        expert_parallel=expert_parallel,
        zero_stage=cell["zero_stage"],
        micro_batch=2,
        precision="fp64" if cell["zero_stage"] == 0 else "fp32",
        exchange=cell["exchange"],
        recompute=cell["recompute"],
        documents=True,
        model={
            "objective": cell["objective"],
            "attention": ATTENTION[cell["attention"]],
            # Equal tokens at equal positions of two documents tie: without capacity, no matter.
            "ffn": {"kind": "moe", "d_expert": 8, "router": router_config(5, 2)},
        },
    )
    found = case.batch().documents
    assert len(found.lengths) > 2 * case.sequences
    reference = one_process(case)
    assert_equal(distributed(pools, case), reference, FP64 if case.zero_stage == 0 else FP32)
