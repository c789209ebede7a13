"""What a zero-shot task is, and its way from files to metrics."""

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
    num_cut: int = 0
    """Examples longer than the model sees, whose beginning was cut off."""


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

    def examples(self, paths: Sequence[Path]) -> dict[Path, list[Example]]:
        """Those of these files, and of the files in these folders: at least one of each.

        Raises:
            DataError: a file is missing or damaged, holds no example, or comes twice.
        """
        examples: dict[Path, list[Example]] = {}
        for file in (file for path in paths for file in find_files(path, self.suffixes)):
            if any(file.samefile(other) for other in examples):
                raise DataError(f"{file}: given twice; give it once: no example counts double")
            examples[file] = self.read(file)
            if not examples[file]:
                raise DataError(f"{file}: no example in it; give another file")
        return examples

    def run(
        self,
        examples: Mapping[Path, list[Example]],
        score: Callable[[list[Request]], list[Score]],
    ) -> Result:
        """Score the examples of all files, in one call of `score`."""
        every = [example for several in examples.values() for example in several]
        requests = [self.requests(example) for example in every]
        scores = iter(score([request for several in requests for request in several]))
        scored = [[next(scores) for _ in several] for several in requests]
        result = self.result(every, scored)
        return result._replace(
            # Files of a task that names parts of its own are these.
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
