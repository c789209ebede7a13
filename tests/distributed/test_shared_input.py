"""Gradients taken in common, as on a GPU, under ZeRO, of which stage 3 frees weights meanwhile."""

from unittest import mock

import pytest

from moa_dist.kernels import shared_input
from tests.distributed import layouts
from tests.distributed.layouts import MOA, Case, assert_equal, one_process, router
from tests.models.test_shared_input import GPU


def on_rank(case: Case) -> tuple:
    with mock.patch.object(shared_input, "Hardware", GPU):
        return layouts.on_rank(case)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("attention", ["switchhead", "moa"])
def test_step_equals_one_process(pools, monkeypatch, attention, exchange, zero_stage):
    model = {"attention": MOA | {"router": router(6, 3, "softmax")}} if attention == "moa" else {}
    case = Case(zero_stage=zero_stage, precision="fp32", exchange=exchange, model=model)
    monkeypatch.setattr(layouts, "on_rank", on_rank)
    assert_equal(layouts.distributed(pools, case), one_process(case), 1e-5)
