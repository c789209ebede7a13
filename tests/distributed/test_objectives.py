"""Masked and translation models take the step of one process too: a few cells beside the matrix.

Micro-batches differ in padding, and sequences may have no target, no source, or be padding alone.
"""

import pytest

from moa_dist.config import load_config
from tests.config.test_shipped_configs import CONFIGS
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, assert_equal, distributed, one_process
from tests.distributed.layouts import router as router_config
from tests.distributed.test_matrix import FP32, FP64
from tests.distributed.test_verify import differences, report_of

BALANCE = {"switch": 0.1, "z_loss": 0.01}
CAPACITY = {"factor": 1.0, "policy": "position"}


def case_of(objective: str, attention: dict, *, micro_batch: int = 2, **more) -> Case:
    routing = router_config(5, 2, "softmax", balance=BALANCE, capacity=CAPACITY)
    return Case(
        micro_batch=micro_batch,
        sequences=16,
        skewed=True,
        label_smoothing=0.1,
        model={
            "objective": objective,
            "num_layers": 2,
            "num_distinct_layers": None,
            "position": "sinusoidal",
            "scale_embeddings": True,
            "tie_embeddings": True,
            "attention": attention | {"router": routing},
            "ffn": {"kind": "moe", "d_expert": 8, "router": router_config(7, 2)},
            "norm_placement": "post",
        },
        **more,
    )


CASES = {
    "masked MoA": case_of("masked", MOA, world_size=4, zero_stage=0),
    "translation MoA": case_of(
        "translation", MOA, world_size=4, zero_stage=0, recompute=True, clip_norm=0.1
    ),
    "translation MoA, weights travel": case_of(
        "translation", MOA, zero_stage=3, exchange="weights", precision="fp32", overlap=True
    ),
    "translation MoA, buckets of unequal size": case_of(
        "translation", MOA, micro_batch=4, zero_stage=1, precision="fp32", uneven=True
    ),
    "translation SwitchHead": case_of("translation", SWITCHHEAD, zero_stage=2, precision="fp32"),
}


@pytest.mark.parametrize("name", CASES)
def test_step_equals_one_process(pools, name):
    case = CASES[name]
    reference = one_process(case)
    assert reference.dropped > 0
    assert reference.aux_losses
    assert_equal(distributed(pools, case), reference, FP64 if case.zero_stage == 0 else FP32)


@pytest.mark.parametrize("file", ["translation/moa.yaml", "masked_lm/8k16e256d.yaml"])
def test_verify_finds_them_equal(pools, file):
    config = load_config(
        CONFIGS / file,
        [
            "parallel.expert_parallel=2",
            "parallel.zero_stage=1",
            "train.precision=fp32",
            "model.attention.router.top_k=3",
        ],
    )
    report = report_of(pools, config, world_size=2)
    assert differences(report) == []
    assert report.real_share < 1
