"""The start of a small run, in a temporary folder."""

import pytest

from moa_dist.config import Config
from moa_dist.observe.metrics import RunStart
from tests.observe.reports import PROVENANCE, make_config


@pytest.fixture
def run_start(tmp_path):
    def make(first_step: int = 0, config: Config | None = None, **changes) -> RunStart:
        values = {
            "config": config or make_config(),
            "folder": str(tmp_path / "runs" / "tiny"),
            "world_size": 2,
            "device": "cpu",
            "backend": "gloo",
            "num_parameters": 4_020_000,
            "num_active_parameters": 1_310_000,
            "flops_per_token": 1.5e7,
            "first_step": first_step,
            "provenance": PROVENANCE,
        }
        return RunStart(**(values | changes))

    return make
