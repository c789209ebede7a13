"""What DeepSpeed is told: it ignores unknown keys, so the dictionary is held against its model."""

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from moa_dist.train.deepspeed_config import deepspeed_config
from tests.distributed.layouts import Case


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_key_is_one_that_deepspeed_knows(zero_stage):
    case = Case(zero_stage=zero_stage, precision="fp32" if zero_stage else "fp64")
    zero = deepspeed_config(case.config(), world_size=2)["zero_optimization"]
    assert zero["stage"] == zero_stage
    known = DeepSpeedZeroConfig.model_fields
    assert set(zero) <= {*known, *(field.alias for field in known.values())}


def test_clipping_is_always_said():
    """DeepSpeed's own default is to clip at 1.0."""
    for clip_norm, expected in ((None, 0.0), (0.25, 0.25)):
        case = Case(zero_stage=1, precision="fp32", clip_norm=clip_norm)
        assert deepspeed_config(case.config(), world_size=2)["gradient_clipping"] == expected


def test_accumulation_fills_the_global_batch():
    case = Case(zero_stage=1, precision="fp32", micro_batch=2)
    assert deepspeed_config(case.config(), world_size=2)["gradient_accumulation_steps"] == 2
