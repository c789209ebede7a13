"""The learning rate is a function of the step."""

import math

import pytest

from moa_dist.config.run import ScheduleConfig
from moa_dist.train.schedule import learning_rate

PEAK, STEPS = 2e-3, 1000


WARM_UP, STABLE = {"steps": 50, "to": 1.0}, {"to": 1.0}
SAME = {
    "constant": ({"warmup_steps": 50}, [WARM_UP]),
    "cosine": (
        {"warmup_steps": 50, "final": 0.2},
        [WARM_UP, {"to": 0.2, "shape": "cosine"}],
    ),
    **{
        f"wsd {shape}": (
            {"warmup_steps": 50, "decay_steps": 300, "decay_shape": shape, "final": 0.0},
            [WARM_UP, STABLE, {"steps": 300, "to": 0.0, "shape": shape}],
        )
        for shape in ("linear", "sqrt", "cosine")
    },
}
"""Schedules, and phases that are the same."""


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


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("warmup_start", [0.0, 0.3])
def test_phases_can_be_every_schedule_that_is_made_of_such_pieces(name, warmup_start):
    fields, phases = SAME[name]
    for step in range(1, STEPS + 1):
        single = rate(step, kind=name.partition(" ")[0], warmup_start=warmup_start, **fields)
        several = rate(step, kind="phases", phases=phases, warmup_start=warmup_start)
        assert several == pytest.approx(single, rel=1e-12, abs=1e-18)


def test_a_second_peak():
    phases = [
        {"steps": 100, "to": 1.0},
        {"steps": 300, "to": 1.0},
        {"steps": 100, "to": 0.1, "shape": "sqrt"},
        {"steps": 50, "to": 0.6},
        {"steps": 200, "to": 0.0, "shape": "cosine"},
    ]
    expected = {
        50: 0.5,
        100: 1.0,
        399: 1.0,
        425: 0.1 + 0.9 * 0.5,
        500: 0.1,
        525: 0.35,
        550: 0.6,
        650: 0.3,
        750: 0.0,
        STEPS: 0.0,
    }
    rates = [rate(step, kind="phases", phases=phases) for step in expected]
    assert rates == pytest.approx([PEAK * fraction for fraction in expected.values()])


def test_a_phase_without_steps_moves_what_follows_with_the_end_of_the_run():
    phases = [WARM_UP, STABLE, {"steps": 100, "to": 0.0}]
    schedule = ScheduleConfig(kind="phases", phases=phases)
    for steps in (STEPS, 400):
        assert learning_rate(steps - 100, PEAK, schedule, steps) == PEAK
        assert learning_rate(steps - 50, PEAK, schedule, steps) == pytest.approx(PEAK / 2)
    assert learning_rate(150, PEAK, schedule, 150) == pytest.approx(0.0)  # no step is left for it
