"""Dense models have the work, or the parameters, of the model they are compared with."""

from pathlib import Path

import pytest

from moa_dist.bench.dense import equal_parameters, equal_work
from moa_dist.config import load_config
from moa_dist.models.counts import count

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name",
    [
        "moeut/44m",
        "small/moa_moe",
        "switchhead/small",
        "small/dense",
        "family/ds_moe",
        "family/monet",
    ],
)
def test_equal_work_leaves_out_routers_alone(name):
    config = load_config(CONFIGS / f"{name}.yaml", [])
    length = config.data.sequence_length
    ours = count(config.model, length).training
    dense = count(equal_work(config.model, length), length).training
    assert "routers" not in dense.macs
    assert dense.total_macs == pytest.approx(
        ours.total_macs - ours.macs.get("routers", 0), rel=0.01
    )


@pytest.mark.parametrize(
    "name", ["moeut/44m", "small/moeut", "small/moa", "family/mor_token", "family/mor_expert"]
)
def test_equal_parameters(name):
    config = load_config(CONFIGS / f"{name}.yaml", [])
    length = config.data.sequence_length
    dense = count(equal_parameters(config.model, length), length)
    assert not dense.experts
    assert dense.total == pytest.approx(count(config.model, length).total, rel=0.005)
