"""The learning rate is a function of the step; decay reaches every parameter."""

import math

import pytest
import torch

from moa_dist.config.run import OptimizerConfig, ScheduleConfig
from moa_dist.train.optimizer import learning_rate, make_optimizer

PEAK, STEPS = 2e-3, 1000


def rate(step: int, **schedule) -> float:
    return learning_rate(step, PEAK, ScheduleConfig(**schedule), STEPS)


def test_warmup_rises_in_a_straight_line_to_the_peak():
    schedule = {"warmup_steps": 100, "warmup_start": 0.2}
    rates = [rate(step, **schedule) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.2 * PEAK, 0.6 * PEAK, PEAK])


def test_cosine_ends_on_the_final_share_at_the_last_step():
    schedule = {"kind": "cosine", "warmup_steps": 200, "final": 0.1}
    assert rate(200, **schedule) == pytest.approx(PEAK)
    assert rate(600, **schedule) == pytest.approx(PEAK * 0.55)
    assert rate(STEPS, **schedule) == pytest.approx(PEAK * 0.1)


def test_inverse_square_root_and_constant():
    schedule = {"kind": "inverse_sqrt", "warmup_steps": 100}
    assert rate(100, **schedule) == pytest.approx(PEAK)
    assert rate(400, **schedule) == pytest.approx(PEAK / math.sqrt(4))
    assert rate(999, kind="constant", warmup_steps=10) == PEAK


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weight_decay_is_on_every_parameter(kind):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))]
    config = OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, [{"params": parameters}])
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        assert torch.allclose(parameter, torch.full_like(parameter, 0.95))
