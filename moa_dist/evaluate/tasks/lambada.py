"""LAMBADA (Paperno et al. 2016): predict the last word of a passage, given the whole passage.

Files are plain text with a passage per line, or JSON Lines with `context` and `continuation` (the
word) or with `text`. As in lm-evaluation-harness, the word is whatever follows the last space of a
passage, which is more than one word if a line break precedes the last word (7 of the 5,153 passages
of the published raw text). It is scored with the white space before it, or a space if there is
none. It is correct if each of its tokens is the most probable one, that is, if greedy decoding
generates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from moa_dist.data.compression import content_suffix
from moa_dist.data.input_kinds import JSONL_SUFFIXES
from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.files import Location, read_lines, read_records, text_field
from moa_dist.evaluate.tasks.task import Mean, Result, Task, mean


def _read(file: Path) -> list[Request]:
    if content_suffix(file) not in JSONL_SUFFIXES:
        return [_split(location, line) for location, line in read_lines(file) if line.strip()]
    return list(_records(file))


def _records(file: Path) -> Iterator[Request]:
    for location, record in read_records(file):
        if "continuation" not in record:
            yield _split(location, text_field(location, record, "text"))
            continue
        context = text_field(location, record, "context")
        word = text_field(location, record, "continuation")
        apart = context[-1].isspace() or word[0].isspace()
        yield Request(context, word if apart else f" {word}")


def _split(location: Location, passage: str) -> Request:
    context, space, word = passage.rstrip().rpartition(" ")
    if not context.strip():
        raise location.error("a passage of a single word; fix the line")
    return Request(context, space + word)


def _requests(passage: Request) -> list[Request]:
    return [passage]


def _result(passages: list[Request], scores: list[list[Score]]) -> Result:
    loss = mean(-score.log_likelihood for (score,) in scores)
    perplexity = math.exp(min(loss.value, 700.0))
    metrics = {
        "accuracy": mean(float(score.greedy) for (score,) in scores),
        # Per word, not per token. Its error follows from that of the loss, to first order.
        "perplexity": Mean(perplexity, perplexity * loss.standard_error),
    }
    return Result(len(passages), metrics, {})


LAMBADA = Task((".jsonl", ".txt"), _read, _requests, _result)
