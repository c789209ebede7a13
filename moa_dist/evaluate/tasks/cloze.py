"""Cloze in the form of the Children's Book Test (Hill et al. 2016): which word is missing?

Files are plain text: 20 numbered sentences, then a line
`21 SENTENCE<TAB>ANSWER<TAB><TAB>CANDIDATE|CANDIDATE|...` with XXXXX in the sentence, then a blank
line. Tokens are separated by spaces in these files (`do n't`, `said ,`); they are joined again,
because models are trained on ordinary text. Each candidate is scored together with the rest of the
sentence, given everything before the gap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import Location, read_lines
from moa_dist.evaluate.tasks.task import Result, Task, is_highest, mean

SENTENCES = 20
BLANK = "XXXXX"
_JOINED = (
    (re.compile(r"``\s*"), '"'),
    (re.compile(r"\s*''"), '"'),
    (re.compile(r"-LRB-\s*"), "("),
    (re.compile(r"\s*-RRB-"), ")"),
    (re.compile(r"\s+(?=[.,:;!?]|n't\b|'(?:s|m|d|ll|re|ve)\b)"), ""),
)


class Question(NamedTuple):
    """Holds a sentence with a gap and the candidates to fill it."""

    before: str
    """All text before the gap."""
    after: str
    """The rest of the sentence."""
    candidates: list[str]
    """Distinct candidates."""
    answer: int
    """Index of the right candidate."""


def join_tokens(text: str) -> str:
    """Undo Penn Treebank tokenization, as far as these files need it."""
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return text


def _read(file: Path) -> list[Question]:
    return list(_questions(file))


def _questions(file: Path) -> Iterator[Question]:
    location, story = Location(file, 0), list[str]()
    for location, line in read_lines(file):
        if not line.strip():
            continue
        number, _, text = line.strip().partition(" ")
        if number != str(len(story) + 1) or not text:
            raise location.error(
                f"expected sentence {len(story) + 1} of a question, as '{len(story) + 1} TEXT'; "
                "fix the line, or is this another task's file?"
            )
        if len(story) < SENTENCES:
            story.append(text)
        else:
            yield _question(location, join_tokens(" ".join(story)), text)
            story = []
    if story:
        raise location.error("the file ends within a question; copy it again")


def _question(location: Location, story: str, line: str) -> Question:
    sentence, *rest = (part for part in line.split("\t") if part)
    if len(rest) != 2 or BLANK not in sentence:
        raise location.error(
            f"expected a sentence with {BLANK}, the answer and the candidates, separated by tabs; "
            "fix the line",
            key="sentence",
        )
    answer = rest[0]
    candidates = list(dict.fromkeys(word for word in rest[1].split("|") if word.strip()))
    if answer not in candidates or len(candidates) < 2:
        raise location.error(
            f"the answer {answer!a} must be one of at least two candidates, but they are "
            f"{', '.join(map(ascii, candidates))}; fix the line",
            key="candidates",
        )
    before, _, after = join_tokens(sentence).partition(BLANK)
    return Question(f"{story} {before}", after, candidates, candidates.index(answer))


def _requests(question: Question) -> list[Request]:
    return [Request(question.before, word + question.after) for word in question.candidates]


def _result(questions: list[Question], scores: list[list[Score]]) -> Result:
    total, per_token = [], []
    for question, several in zip(questions, scores, strict=True):
        total.append(is_highest([score.log_likelihood for score in several], question.answer))
        per_token.append(is_highest([score.per_token for score in several], question.answer))
    metrics = {"accuracy": mean(total), "accuracy_per_token": mean(per_token)}
    return Result(len(questions), metrics, {})


CLOZE = Task((".txt",), _read, _requests, _result)
