"""PIQA (Bisk et al. 2020): which of two solutions reaches a goal in the physical world?

JSON Lines with `goal`, `sol1`, `sol2` and `label` (0 or 1, the right one). The solutions are
continuations of "Question: GOAL\\nAnswer:", as in lm-evaluation-harness and in MoEUT's evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import read_records, text_field
from moa_dist.evaluate.tasks.task import Result, Task, is_highest, mean


class Question(NamedTuple):
    """A goal and two ways to it."""

    goal: str
    """What is wanted."""
    solutions: tuple[str, str]
    """One of them works."""
    label: int
    """Which."""


def _read(file: Path) -> list[Question]:
    return list(_questions(file))


def _questions(file: Path) -> Iterator[Question]:
    for place, record in read_records(file):
        goal, first, second = (text_field(place, record, n) for n in ("goal", "sol1", "sol2"))
        label = record.get("label")
        if label not in (0, 1):
            raise DataError(
                f"{place}: 'label' must be 0 or 1, which solution is right, but is {label!r}; "
                "where labels are in a file of their own, write them into the lines"
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
