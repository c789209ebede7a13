"""What a zero-shot task is, and its way from files to metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import find_files

Example = TypeVar("Example")


class Mean(NamedTuple):
    """A metric, a mean over examples."""

    value: float
    """The mean."""
    standard_error: float
    """Of the mean, over examples drawn independently; 0 for a single example."""


def mean(values: Iterable[float]) -> Mean:
    """Mean of at least one value, and sqrt(sample variance / number)."""
    values = list(values)
    count = len(values)
    value = sum(values) / count
    squares = sum((v - value) ** 2 for v in values)
    return Mean(value, math.sqrt(squares / max(count - 1, 1) / count))


def mean_by(groups: Iterable[str], values: Iterable[float]) -> dict[str, Mean]:
    """The mean of each group, in the order of their names."""
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    return {group: mean(members[group]) for group in sorted(members)}


def is_highest(scores: Sequence[float], correct: int) -> float:
    """1.0 if the correct choice scores higher than every other, 0.0 if not: a tie is a mistake."""
    others = (score for index, score in enumerate(scores) if index != correct)
    return float(scores[correct] > max(others))


class Result(NamedTuple):
    """What a model reached on a task."""

    num_examples: int
    """Examples scored."""
    metrics: dict[str, Mean]
    """Over all examples."""
    groups: dict[str, dict[str, Mean]]
    """Accuracy of parts of the examples: kind of group -> its name -> accuracy."""


@dataclass(frozen=True)
class Task(Generic[Example]):
    """How examples are read, scored and summed up."""

    suffixes: tuple[str, ...]
    """Of the files to read from a folder; each may be compressed."""
    read: Callable[[Path], list[Example]]
    """Examples of a file; raises DataError that names file and line."""
    requests: Callable[[Example], list[Request]]
    """What to score for an example."""
    result: Callable[[list[Example], list[list[Score]]], Result]
    """Examples and their scores, of at least one example -> metrics."""

    def examples(self, paths: Sequence[Path]) -> list[Example]:
        """All examples of these files and folders, at least one.

        Raises:
            DataError: a file is missing or damaged, or there is no example.
        """
        files = [file for path in paths for file in find_files(path, self.suffixes)]
        examples = [example for file in files for example in self.read(file)]
        if not examples:
            raise DataError(f"{', '.join(map(str, paths))}: no example in it; give another file")
        return examples

    def run(self, examples: list[Example], score: Callable[[list[Request]], list[Score]]) -> Result:
        """Score examples, all of them in one call of `score`."""
        requests = [self.requests(example) for example in examples]
        scores = iter(score([request for several in requests for request in several]))
        return self.result(examples, [[next(scores) for _ in several] for several in requests])
