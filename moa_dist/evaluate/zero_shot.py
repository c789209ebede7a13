"""Zero-shot tasks by name, and their evaluation during training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moa_dist.config.run import Config
from moa_dist.data.places import local_path
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Scorer
from moa_dist.evaluate.tasks.blimp import BLIMP
from moa_dist.evaluate.tasks.cloze import CLOZE
from moa_dist.evaluate.tasks.lambada import LAMBADA
from moa_dist.evaluate.tasks.piqa import PIQA
from moa_dist.evaluate.tasks.task import Task

TASKS: dict[str, Task[Any]] = {"blimp": BLIMP, "lambada": LAMBADA, "piqa": PIQA, "cbt": CLOZE}
"""Tasks by the names that `moa-dist eval --tasks` and `evaluation.tasks` accept."""

Examples = dict[str, dict[Path, list[Any]]]
"""Examples by task and file."""


def parse_task(text: str) -> tuple[str, Path]:
    """Split `NAME=PATH`; raises DataError if it is not that, or there is no such task."""
    name, _, path = text.partition("=")
    if not path:
        raise DataError(f"{text!r} must be NAME=PATH, such as blimp=blimp.jsonl")
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; available: {', '.join(TASKS)}")
    return name, Path(path)


def read_tasks(tasks: Iterable[tuple[str, Path]]) -> Examples:
    """Read the examples of all tasks; raises DataError if a file is missing or damaged."""
    paths: dict[str, list[Path]] = {}
    for name, path in tasks:
        paths.setdefault(name, []).append(path)
    return {name: TASKS[name].examples(several) for name, several in paths.items()}


@dataclass(frozen=True)
class TaskEvaluation:
    """The tasks of a run, `evaluation.tasks`, and what scoring them needs."""

    config: Config
    """The run's configuration."""
    tokenizer: Tokenizer
    """The run's tokenizer."""
    examples: Examples
    """What to score."""

    def run(self, model: nn.Module) -> dict[str, float]:
        """Return all metrics of all tasks as `task/metric`. Collective.

        `model` may be sharded; it is an engine or a `LanguageModel`.
        """
        was_training = model.training
        model.eval()
        scorer = Scorer(
            model,
            self.config.model,
            self.tokenizer,
            self.config.data.sequence_length,
            self.config.train.micro_batch,
            self.config.data.document_attention,
        )
        results = {
            name: TASKS[name].run(files, scorer.score) for name, files in self.examples.items()
        }
        model.train(was_training)
        return {
            f"{name}/{metric}": mean.value
            for name, result in results.items()
            for metric, mean in result.metrics.items()
        }


def task_evaluation(config: Config) -> TaskEvaluation | None:
    """Read the run's tasks; None if it has none. Raises DataError."""
    if not config.evaluation.tasks:
        return None
    examples = read_tasks(map(parse_task, config.evaluation.tasks))
    tokenizer = load_tokenizer(local_path(config.data, config.data.sources[0]) / TOKENIZER_FILE)
    return TaskEvaluation(config, tokenizer, examples)
