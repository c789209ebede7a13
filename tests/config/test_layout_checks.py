"""Numbers of ranks that do not fit are refused, with settings and numbers that do."""

from __future__ import annotations

import pytest

from moa_dist.config import find_layout_problems, load_config
from moa_dist.config.layout_checks import WORLD_SIZE
from tests.config.test_config_checks import BATCHES, EP, FFN, plain


def test_traces_of_ranks_that_do_not_exist_are_refused(base):
    wish = ["profile.steps=[5, 6]", "profile.ranks=[1, 2]"]
    (problem,) = find_layout_problems(load_config(base, wish), 2)
    assert plain(problem.suggestions) == {"profile.ranks": [0, 1]}
    wish.append("train.micro_batch=2")
    assert find_layout_problems(load_config(base, wish), 4) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_layout_that_fits(base, world_size):
    overrides = ["train.micro_batch=2"]
    assert find_layout_problems(load_config(base, overrides), world_size) == []


def test_layout_that_does_not_fit_names_what_does(base):
    config = load_config(base, ["train.global_batch=16", "train.micro_batch=4"])
    expert_parallel, readers, batch = find_layout_problems(config, 3)
    assert plain(expert_parallel.suggestions) == {EP: [1, 3], WORLD_SIZE: [2, 4]}
    assert plain(readers.suggestions) == {"data.readers": [6, 9], WORLD_SIZE: [2, 4]}
    assert batch.keys == BATCHES
    assert plain(batch.suggestions) == {BATCHES[0]: [12, 24], BATCHES[1]: []}


def test_layout_suggestions_work(base):
    config = load_config(base, ["train.global_batch=20", "train.micro_batch=4"])
    (problem,) = find_layout_problems(config, 2)
    assert plain(problem.suggestions) == {BATCHES[0]: [16, 24], BATCHES[1]: [2, 5]}
    for override in ("train.global_batch=16", "train.global_batch=24", "train.micro_batch=2"):
        better = load_config(base, ["train.global_batch=20", override])
        assert find_layout_problems(better, 2) == []


@pytest.mark.parametrize("consumed", [None, 320])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 16])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{EP}=1", "train.global_batch=32"],
        [f"{EP}=4", "data.readers=6", "train.global_batch=24", "train.micro_batch=4"],
        ["model.ffn.router.group_sequences=4", "train.global_batch=40", "train.micro_batch=8"],
        ["model.ffn.router.balance.scope=global_batch", "train.global_batch=40"],
        ["profile.steps=[5, 6]", "profile.ranks=[1]"],
    ],
)
def test_following_every_suggestion_leads_to_no_other_refusal(
    base, overrides, world_size, consumed
):
    """Either the settings change, all at once, or the number of ranks does."""
    config = load_config(base, overrides)
    problems = find_layout_problems(config, world_size, consumed)
    sizes = {size for p in problems for size in p.suggestions.get(WORLD_SIZE, ())}
    for size in sizes:
        assert find_layout_problems(config, size, consumed) == []
    if consumed is not None and consumed % world_size:
        assert [p.keys for p in problems] == [()]  # no setting helps
        return
    keys = {key for p in problems for key in p.suggestions if key != WORLD_SIZE}
    choices = {key: [v for p in problems for v in p.suggestions.get(key, ())] for key in keys}
    batches = [(key, value) for key in BATCHES for value in choices.pop(key, ())]
    for key, value in batches or [("train.seed", 0)]:  # one of the two
        fixed = [*overrides, f"{key}={value}"]
        for pick in (0, -1):
            fixes = [
                f"{other}={[values[pick]] if other == 'profile.ranks' else values[pick]}"
                for other, values in choices.items()
            ]
            better = load_config(base, [*fixed, *fixes])
            assert find_layout_problems(better, world_size, consumed) == []


def test_global_batch_statistics_need_the_whole_batch_at_once(base):
    scope = "model.ffn.router.balance.scope=global_batch"
    (problem,) = find_layout_problems(load_config(base, [scope, "train.global_batch=16"]), 2)
    assert problem.keys == (f"{FFN}.balance.scope", "train.micro_batch")
    assert plain(problem.suggestions) == {"train.micro_batch": [8]}
    for fits in ([], ["train.global_batch=16", "train.micro_batch=8"]):
        assert find_layout_problems(load_config(base, [scope, *fits]), 2) == []
