"""A resumed run changes freely what is marked so; every other field needs permission."""

from __future__ import annotations

import pytest

from moa_dist.config import load_config
from moa_dist.config.changes import Change, changes, refused
from moa_dist.config.section import Section


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("model.norm_placement", "pre", "post"),
        ("model.attention.rope.base", 10000.0, 500000.0),
        ("model.attention.rope", {"fraction": 0.5, "base": 10000.0, "scaling": None}, None),
        ("model.ffn.activation", "relu", "gelu"),
        ("model.ffn.router.top_k", 2, 1),
        ("model.ffn.router.score", "sigmoid", "softmax"),
        ("model.ffn.router.gate", "raw", "renormalized"),
        ("model.ffn.router.balance.entropy", 0.0, 0.5),
        ("data.seed", 0, 3),
        ("data.readers", 8, 4),
        ("optimizer.kind", "adamw", "sgd"),
        ("optimizer.lr", 0.00025, 0.001),
        ("schedule.kind", "cosine", "constant"),
        ("train.seed", 0, 5),
        ("train.precision", "fp32", "bf16"),
    ],
)
def test_what_makes_another_run_needs_permission(base, path, before, after):
    overrides = [f"{path}={'null' if after is None else after}"]
    config = load_config(base, overrides)
    found = changes(load_config(base), config)
    assert found == ([], [Change(path, before, after)])
    assert refused(found.deciding, config) == found.deciding
    for allowed in (path, path.partition(".")[0]):
        config = load_config(base, [*overrides, f"checkpoint.allow_changes=[{allowed}]"])
        assert refused(found.deciding, config) == []
    config = load_config(base, [*overrides, "checkpoint.allow_changes=[model.d_model]"])
    assert refused(found.deciding, config) == found.deciding


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("name", "base", "other"),
        ("train.steps", 100, 200),
        ("train.global_batch", 8, 16),
        ("train.micro_batch", 4, 2),
        ("data.train", "data/train", "/elsewhere/train"),
        ("data.workers", 1, 2),
        ("parallel.zero_stage", 1, 3),
        ("parallel.network.bandwidth_gb", 50.0, 10.0),
        ("logging.every", 10, 1),
        ("checkpoint.every", 1000, 10),
    ],
)
def test_what_does_not_is_free(base, path, before, after):
    found = changes(load_config(base), load_config(base, [f"{path}={after}"]))
    assert found == ([Change(path, before, after)], [])


def test_a_section_of_another_kind_is_one_change(base):
    dense = load_config(base, ["model.ffn={kind: dense, d_ff: 32}"])
    assert changes(load_config(base), dense).deciding == [Change("model.ffn", "moe", "dense")]


def test_a_new_field_needs_permission_until_it_is_marked(base):
    class New(Section):
        field: int = 1

    class Grown(type(load_config(base))):
        new: New = New()

    old = Grown.model_validate(load_config(base).model_dump())
    found = changes(old, old.model_copy(update={"new": New(field=2)}))
    assert found == ([], [Change("new.field", 1, 2)])


def test_permission_for_a_field_that_does_not_exist_is_a_problem(base, problems):
    (problem,) = problems(base, "checkpoint.allow_changes=[optimzer]")  # codespell:ignore optimzer
    assert problem.keys == ("checkpoint.allow_changes",)
    assert problem.suggestions == {"checkpoint.allow_changes": ["optimizer"]}


@pytest.mark.parametrize(
    "override", ["name=run #2", "name=#2", "model.ffn=kind: moe #x", "model.norm_eps=1e-5 # small"]
)
def test_an_override_is_not_cut_at_a_comment(base, problems, override):
    (problem,) = problems(base, override)
    (source,) = problem.sources
    assert source.name == f"override `{override}`"


@pytest.mark.parametrize(
    ("override", "name"),
    [("name='run #2'", "run #2"), ('name="a # b"', "a # b"), ("name=a#b", "a#b")],
)
def test_a_quoted_value_keeps_its_number_sign(base, override, name):
    assert load_config(base, [override]).name == name
