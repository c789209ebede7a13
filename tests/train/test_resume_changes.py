"""What follows from a change at resume, and which changes a run refuses to make."""

import re

import pytest

from moa_dist.checkpoint.format import Index
from moa_dist.config.changes import Change
from moa_dist.config.data import SourceConfig
from moa_dist.config.run import Config
from moa_dist.provenance import Provenance, differences
from moa_dist.train.resume_changes import History, describe, find_changes, refusals, replaced
from moa_dist.train.schedule import learning_rate
from tests.observe.reports import make_config
from tests.small_shards import write_folder

STEP = 40


@pytest.fixture
def config(tmp_path) -> Config:
    write_folder(tmp_path / "data")
    train = {"steps": STEP, "global_batch": 8, "micro_batch": 2}
    data = {"train": str(tmp_path / "data"), "sequence_length": 3}
    return make_config(train=train, data=data, optimizer={"lr": 3e-3})


def changed(config: Config, section: str, **fields) -> Config:
    return config.changed(**{section: getattr(config, section).changed(**fields)})


def index(config: Config, step: int = STEP, **state) -> Index:
    return Index(
        format=2, step=step, samples=8 * step, updates=step, state=state, world_size=1,
        config=config, files={}, shapes={}, tensors={},
    )  # fmt: skip


def lines(before: Config, config: Config) -> list[str]:
    return list(describe(find_changes(before, {}, config), before, config, STEP))


def test_nothing_is_said_of_a_run_that_only_goes_on(config):
    assert lines(config, config) == []


def test_more_steps_stretch_the_cosine_and_make_the_learning_rate_jump(config):
    first, jump, cosine = lines(config, changed(config, "train", steps=80))
    assert "train.steps 40 -> 80" in first
    rates = [float(number) for number in re.findall(r"\d\.\d+e-\d+", jump)]
    expected = [
        learning_rate(STEP, 3e-3, config.schedule, 40),
        learning_rate(STEP + 1, 3e-3, config.schedule, 80),
    ]
    assert rates == pytest.approx(expected, rel=0.01)
    assert rates[1] > 5 * rates[0]
    assert re.findall(r"\b\d+\b", cosine) == ["80", "40"]


def test_a_change_without_effect_on_the_learning_rate_has_one_line(config):
    constant = changed(config, "schedule", kind="constant")
    (line,) = lines(constant, changed(constant, "train", steps=80, global_batch=16))
    assert "train.steps 40 -> 80, train.global_batch 8 -> 16" in line


def test_every_refused_change_is_named_with_the_way_to_allow_all(config):
    other = changed(changed(config, "train", seed=5, steps=80), "optimizer", kind="sgd")
    problems = refusals(other, index(config))
    assert [problem.split(" makes ")[0] for problem in problems] == [
        "optimizer.kind adamw -> sgd",
        "train.seed 0 -> 5",
    ]
    assert "checkpoint.allow_changes=[optimizer.kind,train.seed]" in problems[-1]
    allowed = changed(other, "checkpoint", allow_changes=("optimizer", "train.seed"))
    assert refusals(allowed, index(config)) == []


def test_a_branch_is_not_asked_for_another_name(config):
    other = changed(config, "optimizer", kind="sgd")
    branch = changed(other, "init", branch="runs/other")
    for changed_run, advice in ((other, "`name`"), (branch, "`init.weights`")):
        (problem,) = refusals(changed_run, index(config))
        assert [word for word in ("`name`", "`init.weights`") if word in problem] == [advice]


def test_weights_from_elsewhere_only_decide_the_model(config):
    other = changed(changed(config, "train", seed=5), "model", norm="rmsnorm")
    (problem,) = refusals(other, index(config, step=0))
    assert problem.startswith("model.norm layernorm -> rmsnorm")


def test_data_may_move_but_other_data_need_permission(config, tmp_path):
    state = History.after({}, find_changes(config, {}, config), STEP, config).state()
    write_folder(tmp_path / "moved")
    write_folder(tmp_path / "other", num_shards=9)
    moved, other = (
        changed(config, "data", train=str(tmp_path / name)) for name in ("moved", "other")
    )
    change = Change("data.train", str(tmp_path / "data"), str(tmp_path / "moved"))
    assert find_changes(config, state, moved) == ([change], [])
    assert refusals(moved, index(config, **state)) == []
    (problem,) = refusals(other, index(config, **state))
    assert "checkpoint.allow_changes=[data.train]" in problem
    # Also where the folder stays and what it holds is another.
    write_folder(tmp_path / "data", num_shards=10)
    assert [c.path for c in find_changes(config, state, config).deciding] == ["data.train"]


def mixed(config: Config, tmp_path, *folders: str, tasks=None, **weights: float) -> Config:
    """Mix sources by weight, in folders of their names or of these; `tasks` are by name."""
    for folder in (*folders, *weights):
        write_folder(tmp_path / folder)
    paths = zip(folders or weights, weights.items(), strict=True)
    train = tuple(
        SourceConfig(
            path=str(tmp_path / folder), name=name, weight=weight, task=(tasks or {}).get(name)
        )
        for folder, (name, weight) in paths
    )
    return changed(config, "data", train=train)


def test_sources_may_move_but_other_weights_and_sources_need_permission(config, tmp_path):
    before = mixed(config, tmp_path, books=0.7, debian=0.3)
    state = History.after({}, find_changes(before, {}, before), STEP, before).state()
    assert set(state["data"]) == {"books", "debian"}

    moved = mixed(config, tmp_path, "moved", "debian", books=0.7, debian=0.3)
    assert [c.path for c in find_changes(before, state, moved).free] == ["data.train"]
    assert refusals(moved, index(before, **state)) == []
    for other in (
        mixed(config, tmp_path, books=0.6, debian=0.4),
        mixed(config, tmp_path, books=0.7, debian=0.3, web=0.1),
        mixed(config, tmp_path, books=0.7),
        mixed(config, tmp_path, books=0.7, debian=0.3, tasks={"books": 1, "debian": 0}),
        config,
    ):
        (problem,) = refusals(other, index(before, **state))
        assert "checkpoint.allow_changes=[data.train]" in problem
        allowed = changed(other, "checkpoint", allow_changes=("data.train",))
        assert refusals(allowed, index(before, **state)) == []
        assert replaced(state, other) == set()

    write_folder(tmp_path / "debian", num_shards=9)
    assert replaced(state, before) == {"debian"}
    assert [c.path for c in find_changes(before, state, before).deciding] == ["data.train"]


def test_the_history_of_changes_grows(config):
    longer, longest = (changed(config, "train", steps=steps) for steps in (80, 120))
    once = History.after({}, find_changes(config, {}, longer), STEP, longer)
    twice = History.after(once.state(), find_changes(longer, once.state(), longest), 80, longest)
    assert twice.changes == [
        {"step": 40, "path": "train.steps", "before": 40, "after": 80},
        {"step": 80, "path": "train.steps", "before": 80, "after": 120},
    ]


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("torch", True),
        ("deepspeed", True),
        ("triton", True),
        ("nvidia-nccl-cu12", True),
        ("rich", False),
        ("pytest", False),
    ],
)
def test_only_packages_that_numbers_depend_on_are_compared(name, matters):
    then, now = (
        Provenance("code", None, "3.11.2", {name: version}, None) for version in ("1.0", "1.1")
    )
    assert differences(then, now) == (f"{name} 1.1 instead of 1.0" if matters else None)
