"""Combinations that cannot work are refused, with values that do."""

from __future__ import annotations

import pytest

from moa_dist.config import find_layout_problems, load_config

DENSE = ["model.attention.kind=dense", "model.attention.num_heads=2", "model.attention.d_head=16"]
TRANSLATION = ["model.objective=translation"]
DENSE_FFN = ["model.ffn.kind=dense", "model.ffn.d_ff=64"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["name=a/b"], "use a plain name without slashes"),
        (["model.num_distinct_layers=3"], "use 1, 2 or 4"),
        (["model.attention.rope.fraction=0.1"], "rotates no dimension"),
        (["model.attention.router.top_k=5"], "choose at most 4"),
        (["model.ffn.router.top_k=9"], "choose at most 8"),
        (
            ["model.ffn.router.top_k=8", "model.ffn.router.expert_dropout=0.1"],
            "hidden ones too",
        ),
        (
            ["model.ffn.router.top_k=1", "model.ffn.router.gate=renormalized"],
            "would never train the router",
        ),
        (["model.attention.router.group_sequences=3"], "use 1, 2 or 4"),
        (["train.global_batch=9"], "a global batch of 8 or 12, or a micro-batch of 3 or 9"),
        (["train.global_batch=2"], "a global batch of 4, or a micro-batch of 2"),
        (["schedule.warmup_steps=101"], "more than `train.steps` = 100"),
        (["schedule.kind=inverse_sqrt"], "use at least 1"),
        (["schedule.final=1.5"], "share of the peak"),
        (["train.label_smoothing=1"], "train.label_smoothing"),
        ([*TRANSLATION, "data.bucket_tokens=1"], "a bucket must hold one pair"),
        (
            [*TRANSLATION, "data.on_damage=skip", "data.verify=checksums"],
            "reads all pairs before it starts",
        ),
        (
            [*TRANSLATION, "model.ffn.router.group_sequences=2"],
            "the number of sequences changes from one micro-batch",
        ),
        (
            [*TRANSLATION, "model.attention.router.balance.scope=global_batch"],
            "the number of sequences changes from one micro-batch",
        ),
        (["schedule.warmup_start=2"], "share of the peak"),
        (["optimizer.betas=[0.9, 1.0]"], "below 1"),
        (["optimizer.momentum=0.9"], "set `optimizer.kind` to sgd"),
        (["train.precision=bf16", "parallel.zero_stage=0"], "use stage 1"),
        (
            ["checkpoint.every=300", "checkpoint.keep_every=1000"],
            "most steps to keep are never saved; use 900 or 1200",
        ),
        (["profile.steps=[5, 15]"], "at most 10 steps"),
        (["profile.steps=[7, 6]"], "at most 10 steps"),
        (["profile.steps=[98, 101]"], "within the 100 of `train.steps`"),
        ([*DENSE, *DENSE_FFN], "the model has no experts"),
        (["parallel.expert_parallel=9"], "`model.attention` has 8 experts"),
    ],
)
def test_impossible_combination(base, problems, overrides, expected):
    found = problems(base, *overrides)
    assert any(expected in problem for problem in found)
    assert len(found) == (2 if "parallel.expert_parallel=9" in overrides else 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.expert_parallel=8"],  # SwitchHead's 2 heads x 4 experts, and 8 in the FFN
        DENSE_FFN,
        DENSE,
        [*DENSE, *DENSE_FFN, "parallel.expert_parallel=1"],
        ["model.norm_placement=post", "model.tie_embeddings=true"],
        ["parallel.zero_stage=0"],
        ["train.precision=bf16"],
        ["optimizer.kind=sgd", "optimizer.momentum=0.9"],
        ["schedule.warmup_steps=100"],
        ["evaluation.sequences=3"],
        ["checkpoint.every=300", "checkpoint.keep_every=900"],
        ["model.ffn.router.top_k=1", "model.ffn.router.gate=renormalized_detached"],
    ],
)
def test_possible_combination(base, overrides):
    load_config(base, overrides)  # raises on any problem


def test_traces_of_ranks_that_do_not_exist_are_refused(base):
    wish = ["profile.steps=[5, 6]", "profile.ranks=[1, 2]"]
    (problem,) = find_layout_problems(load_config(base, wish), 2)
    assert "names rank 2" in problem
    wish.append("train.micro_batch=2")
    assert find_layout_problems(load_config(base, wish), 4) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_layout_that_fits(base, world_size):
    overrides = ["train.micro_batch=2"]
    assert find_layout_problems(load_config(base, overrides), world_size) == []


def test_layout_that_does_not_fit_names_what_does(base):
    config = load_config(base, ["train.global_batch=16", "train.micro_batch=4"])
    expert_parallel, readers, batch = find_layout_problems(config, 3)
    assert "use 1 or 3, or start 2 or 4 ranks" in expert_parallel
    assert "use 6 or 9" in readers
    assert "3 ranks x `train.micro_batch` 4 = 12; use a global batch of 12 or 24" in batch


def test_layout_suggestions_work(base):
    config = load_config(base, ["train.global_batch=20", "train.micro_batch=4"])
    (problem,) = find_layout_problems(config, 2)
    assert "global batch of 16 or 24, or a micro-batch of 2 or 5" in problem
    for override in ("train.global_batch=16", "train.global_batch=24", "train.micro_batch=2"):
        better = load_config(base, ["train.global_batch=20", override])
        assert find_layout_problems(better, 2) == []


def test_global_batch_statistics_need_the_whole_batch_at_once(base):
    scope = "model.ffn.router.balance.scope=global_batch"
    (problem,) = find_layout_problems(load_config(base, [scope, "train.global_batch=16"]), 2)
    assert "`model.ffn.router.balance.scope` is global_batch, but 2 ranks" in problem
    assert "accumulate 2 micro-batches" in problem
    assert "use `train.micro_batch` = 8" in problem
    assert "bias_rate" in problem
    for fits in ([], ["train.global_batch=16", "train.micro_batch=8"]):
        assert find_layout_problems(load_config(base, [scope, *fits]), 2) == []
