"""Generates text one token at a time, caching keys and values so that each token is read once.

Shapes: B unfinished texts, T tokens read at once, S the maximum context length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.data.tokenizer import Tokenizer
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.cache import Cache
from moa_dist.models.documents import Documents
from moa_dist.models.language_model import LanguageModel, dropless


class Drawn(NamedTuple):
    """Holds a token drawn for one of the prompts."""

    prompt: int
    """Index of the prompt."""
    token: int
    """Id of the token."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    end_of_document: int,
    max_length: int,
    document_attention: bool = False,
    task: int | None = None,
) -> Iterator[Drawn]:
    """Continue all prompts at once, yielding each token as soon as it is drawn.

    A prompt's continuation depends on its index and the other arguments, but neither on the other
    prompts nor on the global random state. Experts drop nothing here, whatever capacity they were
    trained with: see `dropless`.

    Args:
        model: the whole model, in evaluation mode.
        prompts: tokens to continue; an empty prompt starts a document.
        sampling: how to draw tokens.
        max_new_tokens: maximum number of tokens to yield per prompt.
        seed: seed of the draws.
        end_of_document: token that ends a text when drawn; not yielded.
        max_length: maximum context length in tokens (S). A longer prompt is truncated from the
            left; a text that outgrows it is cut to its last S / 2 tokens, which are read again.
        document_attention: whether the model was trained with `data.document_attention`. Then an
            end-of-document token at the start of a prompt is, as in training, the end of another
            document, which the text does not see.
        task: task of all texts, if the model has a router per task.
    """
    end = end_of_document if document_attention else None
    model = dropless(model)
    device = next(model.parameters()).device
    texts = [list(prompt)[-max_length:] or [end_of_document] for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    unfinished, cache = list(range(len(texts))), None
    for _ in range(max_new_tokens):
        seen = [texts[i] for i in unfinished]
        logits, cache = _read(model, seen, cache, end, task)
        kept = []
        for row, i in enumerate(unfinished):
            token = sampling.draw(logits[row], generators[i])
            if token != end_of_document:
                yield Drawn(i, token)
                texts[i].append(token)
                kept.append(row)
        if not kept:
            return
        if len(kept) < len(unfinished):
            unfinished = [unfinished[row] for row in kept]
            cache = cache.select(torch.tensor(kept, device=device))
        for i in unfinished:
            if len(texts[i]) > max_length:
                texts[i] = within(texts[i], max_length)
                cache = None


def _read(
    model: LanguageModel,
    texts: list[list[int]],
    cache: Cache | None,
    end: int | None,
    task: int | None,
) -> tuple[Tensor, Cache]:
    """Return logits [B, V] of the next tokens, fp64 on the CPU, and the extended cache.

    `cache` holds all but the last token of each text; None means that nothing is cached. Tokens see
    their own document only, which ends with the token `end`, unless that is None.
    """
    device = next(model.parameters()).device
    longest = max(map(len, texts)) if cache is None else cache.length + 1
    padded, real = padded_left(texts, longest)
    documents, tasks = None, None
    if task is not None:
        tasks = torch.full((len(texts),), task, device=device)
    if end is not None:
        documents = Documents.of(padded, end, real).moved(lambda part: part.to(device))
    if cache is None:
        token_mask = None if bool(real.all()) else real.to(device)
        tokens, cache = padded.to(device), model.empty_cache()
    else:
        tokens, token_mask = padded[:, -1:].to(device), None
    output = model(tokens, token_mask, cache, documents=documents, tasks=tasks)
    return output.logits[:, -1].double().cpu(), output.cache


def padded_left(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, length], and a bool mask that is false at padding.

    Padding comes first, so that all texts end, and continue, at the same position.
    """
    padded = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    return padded, torch.arange(length) >= torch.tensor([[length - len(text)] for text in texts])


def within(text: list[int], max_length: int) -> list[int]:
    """Cut a text that outgrows `max_length` tokens to the last half of that."""
    return text if len(text) <= max_length else text[-((max_length + 1) // 2) :]


def stream_text(
    tokenizer: Tokenizer, drawn: Iterable[Drawn], prompts: Sequence[Sequence[int]] = ()
) -> Iterator[tuple[int, str]]:
    """Decode ids as they arrive, in pieces of whole characters.

    Yields (index of the prompt, piece); a prompt's concatenated pieces are its decoded text. A
    tokenizer that is not byte-level drops the space before a text's first word, so it needs the
    ids of the prompts that the text continues.
    """
    held: dict[int, list[int]] = {}
    before = {} if tokenizer.is_byte_level else {i: list(ids) for i, ids in enumerate(prompts)}
    for prompt, token in drawn:
        ids = [*held.pop(prompt, []), token]
        text = _decode_after(tokenizer, before.get(prompt, []), ids)
        # An incomplete character decodes to U+FFFD.
        if text.endswith("\ufffd"):
            held[prompt] = ids
        else:
            yield prompt, text
            if not tokenizer.is_byte_level:
                before[prompt] = ids
    for prompt, ids in held.items():
        yield prompt, _decode_after(tokenizer, before.get(prompt, []), ids)


def _decode_after(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """Decode ids that follow others."""
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
