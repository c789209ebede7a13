"""Kinds that the package has never heard of are sharded like its own; see `tests/kinds/toy.py`."""

import importlib

import pytest
import torch

from moa_dist.config import Config
from moa_dist.distributed.mesh import make_mesh
from moa_dist.verify.verify import Report, verify
from tests.kinds.case import TOY, config_of, toy

__all__ = ["toy"]


def on_rank(config: dict[str, object]) -> Report:
    importlib.import_module(TOY)
    whole = Config.model_validate(config)
    return verify(whole, make_mesh(whole.parallel.expert_parallel), torch.device("cpu"))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_sharded_it_equals_one_process(pools, zero_stage, exchange):
    config = config_of(2, exchange, zero_stage).model_dump()
    for report in pools(2).run(on_rank, config):
        assert report.checks
        assert [check for check in report.checks if not check.equal] == []
