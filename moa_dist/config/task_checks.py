"""Checks of models with a router per task: data must say which task its sequences belong to."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.run import Config
from moa_dist.errors import Problem


def tasks_of_data(config: Config) -> Iterator[Problem]:
    """Every folder has a task that exists, and nothing reads text without one."""
    num_tasks = config.model.num_tasks
    if not num_tasks:
        return
    for name, router in config.model.routers().items():
        if router.num_tasks not in (0, num_tasks):
            key = f"model.{name}.tasks"
            yield Problem(
                f"`{key}` is {router.num_tasks}, but another router has {num_tasks}; a sequence "
                "has one task for all routers",
                (key,),
            )
    if config.model.objective == "translation":
        yield Problem(
            "a router per task does not work with `model.objective` translation, which reads one "
            "folder, and so one task",
            ("model.objective",),
        )
        return
    data = config.data
    for field, folders, is_list in (
        ("data.train", data.sources, not isinstance(data.train, str)),
        ("data.valid", data.held_out, not isinstance(data.valid, str)),
    ):
        for index, folder in enumerate(folders):
            key = f"{field}.{index}.task" if is_list else field
            if folder.task is None or folder.task >= num_tasks:
                what = "has no task" if folder.task is None else f"has task {folder.task}"
                yield Problem(
                    f"`{field}`: {folder.path} {what}, but the model has a router for each of "
                    f"{num_tasks} tasks; list its folders, each with a `task` below {num_tasks}",
                    (key,),
                )
    unknown = {
        "evaluation.tasks": config.evaluation.tasks,
        "evaluation.samples.prompts": config.evaluation.samples.prompts,
    }
    for key, is_set in unknown.items():
        if is_set:
            yield Problem(
                f"`{key}` are texts of no task, but the model has a router per task; remove them",
                (key,),
            )
