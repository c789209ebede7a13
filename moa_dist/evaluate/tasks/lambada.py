"""LAMBADA (Paperno et al. 2016): the last word of a passage, which takes all of it to guess.

Plain text, a passage per line, or JSON Lines with `context` and `continuation` (the word), or with
`text`. The word is what follows the last space of a passage, as in lm-evaluation-harness: where a
line ends before the last word, that is more than one word (7 of the 5,153 passages of the published
raw text). It is scored with the white space before it, a space if there is none. It is right if
each of its tokens is the most probable one, which is to say that greedy decoding writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from moa_dist.data.text import JSONL_SUFFIXES, content_suffix
from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import read_lines, read_records, text_field
from moa_dist.evaluate.tasks.task import Mean, Result, Task, mean


def _read(file: Path) -> list[Request]:
    if content_suffix(file) not in JSONL_SUFFIXES:
        return [_split(place, line) for place, line in read_lines(file) if line.strip()]
    return list(_records(file))


def _records(file: Path) -> Iterator[Request]:
    for place, record in read_records(file):
        if "continuation" not in record:
            yield _split(place, text_field(place, record, "text"))
            continue
        context = text_field(place, record, "context")
        word = text_field(place, record, "continuation")
        apart = context[-1].isspace() or word[0].isspace()
        yield Request(context, word if apart else f" {word}")


def _split(place: str, passage: str) -> Request:
    context, space, word = passage.rstrip().rpartition(" ")
    if not context.strip():
        raise DataError(f"{place}: a passage of a single word; mend the line")
    return Request(context, space + word)


def _requests(passage: Request) -> list[Request]:
    return [passage]


def _result(passages: list[Request], scores: list[list[Score]]) -> Result:
    loss = mean(-score.log_likelihood for (score,) in scores)
    perplexity = math.exp(min(loss.value, 700.0))
    metrics = {
        "accuracy": mean(float(score.greedy) for (score,) in scores),
        # Of words, not of tokens. Its error is that of the loss, to first order.
        "perplexity": Mean(perplexity, perplexity * loss.standard_error),
    }
    return Result(len(passages), metrics, {})


LAMBADA = Task((".jsonl", ".txt"), _read, _requests, _result)
