"""Selection biases move once per step, by the load of all ranks, and are saved and restored.

Every rank has data of its own, some of it padding, and some experts get few tokens.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from moa_dist.checkpoint.format import checkpoints, read_model
from moa_dist.errors import BadStepReason
from tests.distributed.layouts import (
    MOA,
    Case,
    assert_equal,
    balanced,
    distributed,
    one_process,
    whole,
)
from tests.distributed.test_checkpoint import run_steps
from tests.distributed.test_engine import poisoned_step

FP64 = 1e-9

BIAS = 0.03
"""Large: within three steps it changes which experts are chosen."""
BIASED = Case(skewed=True, steps=3, optimizer="adamw", model=balanced(bias_rate=BIAS))
LAYOUTS = {
    "one rank": replace(BIASED, world_size=1, expert_parallel=1, micro_batch=8),
    "ep 2, accumulated": BIASED,
    "ep 2, recomputed": replace(BIASED, recompute=True),
    "ep 1": replace(BIASED, expert_parallel=1, micro_batch=4),
    "ep 1, moa": replace(BIASED, expert_parallel=1, model=balanced(MOA, bias_rate=BIAS)),
    "ep 2 x edp 2, weights travel": replace(BIASED, world_size=4, exchange="weights"),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_biased_steps_equal_one_process(pools, case):
    """With shared layers: twice applied, their biases still move once."""
    reference = one_process(case)
    biases = {n: b for n, b in reference.parameters.items() if n.endswith("bias.value")}
    assert len(biases) == 2 * (3 if "value_router" in "".join(biases) else 2)
    for bias in biases.values():
        assert set(bias.div(BIAS).round(decimals=9).abs().flatten().tolist()) <= {0, 1, 2, 3}
    assert_equal(distributed(pools, case), reference, FP64)


def test_bias_changes_the_choice():
    """Else the test above would prove little."""
    case = replace(BIASED, model=balanced(bias_rate=1e-12))
    assert abs(one_process(case).loss - one_process(BIASED).loss) > 1e-4


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_refused_step_moves_no_bias(pools, zero_stage):
    precision = "fp64" if zero_stage == 0 else "fp32"
    case = replace(BIASED, zero_stage=zero_stage, precision=precision)
    for reason, grad_norm, changed in pools(2).run(poisoned_step, case):
        assert reason is BadStepReason.GRAD_NORM
        assert not math.isfinite(grad_norm)
        assert not changed  # biases included


ADAM = replace(BIASED, clip_norm=0.1, precision="fp32")
RESUMED = {
    "ZeRO 0, fp64": replace(ADAM, zero_stage=0, precision="fp64"),
    "ZeRO 1": replace(ADAM, zero_stage=1),
    "ZeRO 1, bf16": replace(ADAM, zero_stage=1, precision="bf16"),
    "ZeRO 2, bf16": replace(ADAM, zero_stage=2, precision="bf16"),
    "ZeRO 3, bf16": replace(ADAM, zero_stage=3, precision="bf16"),
}


@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED.keys())
def test_resumed_run_goes_on_bit_for_bit(pools, tmp_path, case):
    run = partial(pools(2).run, run_steps)
    together = run(case, tmp_path / "a", seed=0, first=1, last=4, save=False)
    run(case, tmp_path / "b", seed=0, first=1, last=2, save=True)
    resumed = run(case, tmp_path / "b", seed=1, first=3, last=4, save=False)
    for (ours, _), (theirs, _) in zip(resumed, together, strict=True):
        assert ours == theirs[2:]
    biases = {
        n: b
        for (n, _), b in whole([state for _, state in resumed], case).items()
        if n.endswith("bias.value")
    }
    wide = torch.float64 if case.precision == "fp64" else torch.float32
    assert biases
    for bias in biases.values():
        assert bias.dtype == wide
        assert bias.any()


@pytest.mark.parametrize(
    "target",
    [
        replace(ADAM, world_size=1, expert_parallel=1, zero_stage=0),
        replace(ADAM, world_size=4, expert_parallel=4, zero_stage=3),
    ],
    ids=["W 1 ZeRO 0", "W 4 ep 4 ZeRO 3"],
)
def test_other_layouts_and_one_process_read_the_same_biases(pools, tmp_path, target):
    source = replace(ADAM, zero_stage=2)
    pools(2).run(run_steps, source, tmp_path, seed=0, first=1, last=2, save=True)
    again = {"seed": 1, "first": 3, "last": 3, "save": False}
    expected, ours = (
        whole([state for _, state in pools(c.world_size).run(run_steps, c, tmp_path, **again)], c)
        for c in (source, target)
    )
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
    loaded = read_model(checkpoints(tmp_path)[-1])[0].state_dict()
    for (name, _), value in expected.items():
        if name.endswith("bias.value"):
            assert torch.equal(loaded[name].flatten(), value), name
