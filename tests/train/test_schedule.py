"""The learning rate is a function of the step."""

import math

import pytest

from moa_dist.config.run import ScheduleConfig
from moa_dist.train.schedule import learning_rate

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


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_wsd_stays_at_the_peak_and_ends_on_the_final_share(shape):
    schedule = {"kind": "wsd", "warmup_steps": 50, "decay_steps": 200, "decay_shape": shape}
    assert rate(25, **schedule) == pytest.approx(PEAK / 2)
    assert rate(50, **schedule) == rate(800, **schedule) == PEAK
    assert rate(STEPS, **schedule) == pytest.approx(PEAK * 0.1)
    quarter = 0.1 + 0.9 * {"linear": 0.75, "sqrt": 0.5, "cosine": (1 + math.sqrt(0.5)) / 2}[shape]
    assert rate(850, **schedule) == pytest.approx(PEAK * quarter)
