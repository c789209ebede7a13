"""When a bad step ends the run, what counts as a spike, and what a checkpoint remembers."""

import math

import pytest

from moa_dist.config.run import TrainConfig
from moa_dist.errors import BadStepError, BadStepReason, TrainingError
from moa_dist.train.bad_steps import BadSteps, Discarded

NAN = BadStepError("not finite", BadStepReason.LOSS, {"cross_entropy": float("nan")})


def policy(state=None, **changes) -> BadSteps:
    values = {"steps": 100, "global_batch": 8, "micro_batch": 2, "on_bad_step": "skip"}
    return BadSteps(TrainConfig(**(values | changes)), state)


def test_stop_raises_what_was_wrong():
    with pytest.raises(BadStepError) as error:
        policy(on_bad_step="stop").reject(NAN, 1)
    assert error.value is NAN


@pytest.mark.parametrize("on_bad_step", ["skip", "rewind"])
def test_too_many_in_a_row_end_the_run(on_bad_step):
    bad = policy(on_bad_step=on_bad_step, bad_step_limit=2)
    bad.reject(NAN, 7)
    bad.reject(NAN, 7)
    with pytest.raises(TrainingError, match=r"\bstep 7\b.*train\.bad_step_limit = 2\b") as error:
        bad.reject(NAN, 7)
    assert error.value.__cause__ is NAN


def test_a_row_ends_when_the_bad_step_is_taken():
    bad = policy(bad_step_limit=1)
    for _ in range(5):
        bad.reject(NAN, 7)
        bad.accept(7, 1.0)


def test_repeating_steps_before_the_bad_one_does_not_end_the_row():
    bad = policy(on_bad_step="rewind", bad_step_limit=1)
    bad.reject(NAN, 7)
    bad.accept(5, 1.0)
    bad.accept(6, 1.0)
    with pytest.raises(TrainingError):
        bad.reject(NAN, 7)


def test_spike_is_measured_by_the_median_of_enough_losses():
    bad = policy(spike_factor=2.0)
    for step in range(1, 10):
        bad.accept(step, 100.0 if step == 5 else 3.0)
        assert bad.loss_limit == math.inf
    bad.accept(10, 3.0)
    assert bad.loss_limit == 6.0
    for step in range(11, 111):
        bad.accept(step, 1.0)
    assert bad.loss_limit == 2.0


def test_without_a_factor_nothing_is_a_spike():
    bad = policy()
    for step in range(1, 50):
        bad.accept(step, 1.0)
    assert bad.loss_limit == math.inf


def test_resumed_run_decides_as_the_interrupted_one():
    bad = policy(spike_factor=2.0, bad_step_limit=1)
    for step in range(1, 12):
        bad.accept(step, float(step))
    bad.reject(NAN, 12)
    bad.discard(88, 96, 12, NAN)
    again = policy(bad.state(), spike_factor=2.0, bad_step_limit=1)
    assert again.state() == bad.state()
    assert again.loss_limit == bad.loss_limit == 12.0
    assert again.discarded == [Discarded(88, 95, 12, str(NAN))]
    with pytest.raises(TrainingError):
        again.reject(NAN, 12)


def test_going_back_restores_losses_but_not_what_was_discarded():
    bad = policy(on_bad_step="rewind", spike_factor=2.0)
    for step in range(1, 11):
        bad.accept(step, 1.0)
    before = bad.state()
    for step in range(11, 90):
        bad.accept(step, 5.0)
    bad.reject(NAN, 90)
    bad.rollback(before)
    bad.discard(80, 720, 90, NAN)
    assert bad.loss_limit == 2.0
    assert len(bad.discarded) == 1
    assert before["given_up"] == []


def test_samples_are_listed_once_though_two_rewinds_pass_over_them():
    bad = policy(on_bad_step="rewind")
    bad.discard(80, 120, 15, NAN)
    bad.discard(80, 136, 12, NAN)
    assert [(g.first, g.last) for g in bad.discarded] == [(80, 119), (120, 135)]
