"""PIQA (Bisk et al. 2020): which of two solutions reaches a goal in the physical world?

Files are JSON Lines with `goal`, `sol1`, `sol2` and `label` (0 or 1, the correct solution). The
solutions are scored as continuations of "Question: GOAL\\nAnswer:", as in lm-evaluation-harness and
in MoEUT's evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import read_records, text_field
from moa_dist.evaluate.tasks.task import Result, Task, is_highest, mean


class Question(NamedTuple):
    """Holds a goal and two solutions."""

    goal: str
    """The goal."""
    solutions: tuple[str, str]
    """Two solutions, one of which works."""
    label: int
    """Index of the solution that works."""


def _read(file: Path) -> list[Question]:
    return list(_questions(file))


def _questions(file: Path) -> Iterator[Question]:
    for location, record in read_records(file):
        goal, first, second = (text_field(location, record, n) for n in ("goal", "sol1", "sol2"))
        label = record.get("label")
        if label not in (0, 1):
            raise location.error(
                f"'label' must be 0 or 1, the correct solution, but is {label!r}; if the labels "
                "are in a separate file, write them into the lines",
                key="label",
            )
        yield Question(goal, (first, second), int(label))


def _requests(question: Question) -> list[Request]:
    context = f"Question: {question.goal}\nAnswer:"
    return [Request(context, f" {solution}") for solution in question.solutions]


def _result(questions: list[Question], scores: list[list[Score]]) -> Result:
    total, per_token, per_character = [], [], []
    for question, two in zip(questions, scores, strict=True):
        sums = [score.log_likelihood for score in two]
        lengths = [len(solution) for solution in question.solutions]
        means = [value / length for value, length in zip(sums, lengths, strict=True)]
        total.append(is_highest(sums, question.label))
        per_token.append(is_highest([score.per_token for score in two], question.label))
        per_character.append(is_highest(means, question.label))
    metrics = {
        "accuracy": mean(total),
        "accuracy_per_token": mean(per_token),
        "accuracy_per_character": mean(per_character),
    }
    return Result(len(questions), metrics, {})


PIQA = Task((".jsonl",), _read, _requests, _result)
