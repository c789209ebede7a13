"""BLiMP (Warstadt et al. 2020): does the model prefer the grammatical one of two sentences?

Files are JSON Lines with `sentence_good`, `sentence_bad`, `UID` (the paradigm) and
`linguistics_term` (the phenomenon), as published, or the short names `good`, `bad`, `uid` and
`phenomenon`. Both sentences are scored in full, as the start of a document; the higher sum wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import read_records, text_field
from moa_dist.evaluate.tasks.task import Result, Task, is_highest, mean, mean_by


class Pair(NamedTuple):
    """Holds two sentences that differ in little more than their grammar."""

    good: str
    """The grammatical sentence."""
    bad: str
    """The ungrammatical sentence."""
    paradigm: str
    """One of 67 paradigms."""
    phenomenon: str
    """One of 12 phenomena (13 in the published files), each with several paradigms."""


def _read(file: Path) -> list[Pair]:
    return [
        Pair(
            good=text_field(location, record, "sentence_good", "good"),
            bad=text_field(location, record, "sentence_bad", "bad"),
            paradigm=text_field(location, record, "UID", "uid"),
            phenomenon=text_field(location, record, "linguistics_term", "phenomenon"),
        )
        for location, record in read_records(file)
    ]


def _requests(pair: Pair) -> list[Request]:
    return [Request("", pair.good), Request("", pair.bad)]


def _result(pairs: list[Pair], scores: list[list[Score]]) -> Result:
    correct = [is_highest([score.log_likelihood for score in two], 0) for two in scores]
    return Result(
        len(pairs),
        {"accuracy": mean(correct)},
        {
            "phenomenon": mean_by((pair.phenomenon for pair in pairs), correct),
            "paradigm": mean_by((pair.paradigm for pair in pairs), correct),
        },
    )


BLIMP = Task((".jsonl",), _read, _requests, _result)
