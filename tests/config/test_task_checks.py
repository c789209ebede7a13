"""Models with a router per task know the task of all their data."""

import pytest

from moa_dist.config.checks import check_fields
from tests.distributed.layouts import MOA, Case

ROUTER = {"kind": "task", "tasks": 2, "num_experts": 4, "top_k": 2}


def problems(router=(), model=(), **sections):
    """The keys of every problem, of folders of data unless `sections` has others."""
    parts = {"attention": MOA | {"router": ROUTER | dict(router)}} | dict(model)
    config = Case(world_size=1, expert_parallel=1, zero_stage=1, precision="fp32", model=parts)
    values = config.config().model_dump()
    train = [{"path": f"of{task}", "weight": 1.0, "task": task} for task in (0, 1)]
    values["data"] |= {"train": train}
    for name, section in sections.items():
        values[name] |= section
    config = type(config.config()).model_validate(values)
    return [problem.keys for problem in check_fields(config)]


def test_sources_with_tasks_are_fine():
    assert problems() == []
    valid = [{"path": "held_out", "task": 1}]
    assert problems(data={"valid": valid}) == []


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"data": {"train": "one"}}, "data.train"),
        ({"data": {"train": [{"path": "one", "weight": 1.0}]}}, "data.train.0.task"),
        ({"data": {"valid": [{"path": "one", "task": 2}]}}, "data.valid.0.task"),
        ({"data": {"valid": "one"}}, "data.valid"),
        ({"evaluation": {"samples": {"prompts": ["a"]}}}, "evaluation.samples.prompts"),
        ({"router": {"task_information": 0.1}}, "model.attention.router.task_information"),
        ({"router": {"gate": "renormalized"}}, "model.attention.router.gate"),
    ],
)
def test_what_has_no_task_is_named(sections, key):
    assert [keys[0] for keys in problems(**sections)] == [key]


def test_all_routers_have_the_same_tasks():
    ffn = {"kind": "moe", "d_expert": 8, "router": ROUTER | {"tasks": 3}}
    assert "model.attention.router.tasks" in [keys[0] for keys in problems(model={"ffn": ffn})]
