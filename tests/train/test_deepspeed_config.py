"""What DeepSpeed is told: it ignores unknown keys, so the dictionary is held against its model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from moa_dist.config import load_config
from moa_dist.errors import ConfigError
from moa_dist.models.language_model import LanguageModel
from moa_dist.train.deepspeed_config import deepspeed_config
from tests.distributed.layouts import Case


def of_two_ranks(case: Case) -> dict[str, Any]:
    return deepspeed_config(case.config(), world_size=2, largest_parameter=1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_key_is_one_that_deepspeed_knows(zero_stage):
    case = Case(zero_stage=zero_stage, precision="fp32" if zero_stage else "fp64")
    zero = of_two_ranks(case)["zero_optimization"]
    assert zero["stage"] == zero_stage
    known = DeepSpeedZeroConfig.model_fields
    assert set(zero) <= {*known, *(field.alias for field in known.values())}


def test_clipping_is_always_said():
    """DeepSpeed's own default is to clip at 1.0."""
    for clip_norm, expected in ((None, 0.0), (0.25, 0.25)):
        case = Case(zero_stage=1, precision="fp32", clip_norm=clip_norm)
        assert of_two_ranks(case)["gradient_clipping"] == expected


def test_accumulation_fills_the_global_batch():
    case = Case(zero_stage=1, precision="fp32", micro_batch=2)
    assert (
        deepspeed_config(case.config(), world_size=2, largest_parameter=1)[
            "gradient_accumulation_steps"
        ]
        == 2
    )


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize(
    "name", ["jetmoe/8b", "moeut/100b", "moeut/244m", "moeut/727m", "moeut/1b", "moeut/44m"]
)
def test_no_gradient_is_larger_than_the_bucket_that_is_reduced_beside_the_backward_pass(
    monkeypatch, name, zero_stage
):
    """DeepSpeed frees such a gradient while its reduction stream may still read it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    config = load_config(path, [f"parallel.zero_stage={zero_stage}"])
    with torch.device("meta"):
        model = LanguageModel(config.model)
    largest = max(parameter.numel() for parameter in model.parameters())
    zero = deepspeed_config(config, 1, largest)["zero_optimization"]
    assert zero["overlap_comm"]
    assert zero["reduce_bucket_size"] >= largest


@pytest.mark.parametrize("section", ["zero_optimization", "parallel.zero_optimization"])
def test_nobody_overrides_what_deepspeed_is_told(section):
    """A smaller bucket could give wrong gradients without a word."""
    path = Path(__file__).parents[2] / "configs" / "moeut/244m.yaml"
    key = f"{section}.reduce_bucket_size"
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{key}=1000"])
    assert [problem.keys for problem in error.value.problems] == [(section,)]
