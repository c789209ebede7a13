"""Defines what a zero-shot task is, and runs it from files to metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import find_files

Example = TypeVar("Example")


class Mean(NamedTuple):
    """Holds a metric that is a mean over examples."""

    value: float
    """The mean."""
    standard_error: float
    """Standard error of the mean for independent examples; 0 for a single example."""


def mean(values: Iterable[float]) -> Mean:
    """Compute the mean of at least one value, and its error sqrt(sample variance / count)."""
    values = list(values)
    count = len(values)
    value = sum(values) / count
    squares = sum((v - value) ** 2 for v in values)
    return Mean(value, math.sqrt(squares / max(count - 1, 1) / count))


def mean_by(groups: Iterable[str], values: Iterable[float]) -> dict[str, Mean]:
    """Compute the mean of each group, in the order of their names."""
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    return {group: mean(members[group]) for group in sorted(members)}


def is_highest(scores: Sequence[float], correct: int) -> float:
    """Return 1.0 if the correct choice scores strictly highest, else 0.0: a tie is wrong."""
    others = (score for index, score in enumerate(scores) if index != correct)
    return float(scores[correct] > max(others))


class Result(NamedTuple):
    """Holds a model's results on a task."""

    num_examples: int
    """Number of examples scored."""
    metrics: dict[str, Mean]
    """Metrics over all examples."""
    groups: dict[str, dict[str, Mean]]
    """Accuracy on subsets of the examples: kind of group -> its name -> accuracy."""
    num_cut: int = 0
    """Examples longer than the model's context, which were truncated from the left."""


@dataclass(frozen=True)
class Task(Generic[Example]):
    """Defines how examples are read, scored and aggregated."""

    suffixes: tuple[str, ...]
    """Suffixes of the files to read from a folder; each may be compressed."""
    read: Callable[[Path], list[Example]]
    """Reads the examples of a file; raises DataError that names file and line."""
    requests: Callable[[Example], list[Request]]
    """Builds the requests to score for an example."""
    result: Callable[[list[Example], list[list[Score]]], Result]
    """Computes metrics from at least one example and the scores of each."""

    def examples(self, paths: Sequence[Path]) -> dict[Path, list[Example]]:
        """Read the examples of these files, and of the files in these folders.

        Raises:
            DataError: a file is missing or damaged, holds no example, or is given twice.
        """
        examples: dict[Path, list[Example]] = {}
        for file in (file for path in paths for file in find_files(path, self.suffixes)):
            if any(file.samefile(other) for other in examples):
                raise DataError(
                    f"{file}: given twice; give it once, so that no example counts double",
                    path=file,
                )
            examples[file] = self.read(file)
            if not examples[file]:
                raise DataError(f"{file}: no example in it; give another file", path=file)
        return examples

    def run(
        self,
        examples: Mapping[Path, list[Example]],
        score: Callable[[list[Request]], list[Score]],
    ) -> Result:
        """Score the examples of all files in one call of `score`."""
        every = [example for several in examples.values() for example in several]
        requests = [self.requests(example) for example in every]
        scores = iter(score([request for several in requests for request in several]))
        scored = [[next(scores) for _ in several] for several in requests]
        result = self.result(every, scored)
        return result._replace(
            # A task that defines no groups of its own is grouped by file.
            groups=result.groups or {"file": self._by_file(examples, scored)},
            num_cut=sum(any(score.cut for score in several) for several in scored),
        )

    def _by_file(
        self, examples: Mapping[Path, list[Example]], scored: list[list[Score]]
    ) -> dict[str, Mean]:
        rest = iter(scored)
        unique = len({file.name for file in examples}) == len(examples)
        return {
            file.name if unique else str(file): self.result(
                several, list(islice(rest, len(several)))
            ).metrics["accuracy"]
            for file, several in examples.items()
        }
