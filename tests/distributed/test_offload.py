"""Steps and checkpoints are the same with the optimizer's state in host memory, at ZeRO 1 to 3."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.layouts import Case, assert_equal, distributed, one_process, whole
from tests.distributed.test_engine import FP32, TROUBLE, steps_with_trouble
from tests.distributed.test_reshard import resume_each, train_and_save

STAGES = [1, 2, 3]
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]


def case_of(zero_stage: int, layout: tuple[int, int] = (2, 2), **more: Any) -> Case:
    world_size, expert_parallel = layout
    fields = {"precision": "fp32", "optimizer": "adamw", "clip_norm": 0.1, "steps": 2} | more
    return Case(
        world_size=world_size,
        expert_parallel=expert_parallel,
        zero_stage=zero_stage,
        micro_batch=4 // world_size,
        offload="host",
        eps=1e-3,
        **fields,
    )


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS, ids="W{0[0]} ep{0[1]}".format)
def test_steps_equal_one_process(pools, layout, zero_stage):
    case = case_of(zero_stage, layout)
    assert_equal(distributed(pools, case), one_process(case), FP32)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["gradients", "clipped"])
def test_sgd_shows_that_gradients_are_equal(pools, clip_norm, zero_stage):
    case = case_of(zero_stage, optimizer="sgd", clip_norm=clip_norm, steps=1)
    assert_equal(distributed(pools, case), one_process(case), FP32)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_placement_alone_differs(pools, precision, zero_stage):
    there = case_of(zero_stage, precision=precision)
    here = replace(there, offload="none")
    assert_equal(distributed(pools, there), distributed(pools, here), 1e-6)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_refused_step_leaves_no_trace(pools, precision, zero_stage):
    case = case_of(zero_stage, precision=precision)
    expected = pools(2).run(steps_with_trouble, case, None)
    for trouble in TROUBLE:
        found = pools(2).run(steps_with_trouble, case, trouble)
        for without, refused in zip(expected, found, strict=True):
            assert without[0] == refused[0]
            assert all(torch.equal(a, b) for a, b in zip(without[1], refused[1], strict=True))


@pytest.fixture(scope="module")
def crossed(pools, tmp_path_factory):
    """What runs with and without offload saved, and what each stage made of the other kind's."""
    folder = tmp_path_factory.mktemp("offload")
    there = {zero_stage: case_of(zero_stage) for zero_stage in STAGES}
    cases = there | {-number: replace(case, offload="none") for number, case in there.items()}
    folders = {key: folder / str(key) for key in cases}
    ranks = pools(2)
    saved = {key: ranks.run(train_and_save, case, 1, folders[key]) for key, case in cases.items()}
    loaded = {key: ranks.run(resume_each, case, folders) for key, case in cases.items()}
    return saved, loaded


@pytest.mark.parametrize("target", [*STAGES, *(-number for number in STAGES)])
def test_checkpoints_do_not_tell(crossed, target):
    """A run with offload continues one without, and the other way round; itself bit for bit."""
    saved, loaded = crossed
    case = case_of(abs(target))
    for source, ranks in saved.items():
        expected = whole([state for state, _ in ranks], case)
        found = whole([rank[source][0] for rank in loaded[target]], case)
        assert {kind for _, kind in expected} == {"master", "exp_avg", "exp_avg_sq"}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        loss, expected_loss = loaded[target][0][source][1], ranks[0][1]
        assert loss == pytest.approx(expected_loss, rel=0 if source == target else 1e-5)
