"""Continuing texts, one token at a time: each is read once, and its keys and values are kept.

Shapes: B texts that still go on, T tokens that are read at once, S the most that the model sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.data.tokenizer import Tokenizer
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.cache import Cache
from moa_dist.models.language_model import LanguageModel, dropless


class Drawn(NamedTuple):
    """A token that continues one of the prompts."""

    prompt: int
    """Which one: its index."""
    token: int
    """Id."""


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
) -> Iterator[Drawn]:
    """Continue all prompts at once, yielding each token as soon as it is drawn.

    A prompt's continuation depends on its index and the other arguments, not on the other prompts
    nor on whatever else draws random numbers. Experts drop nothing here, whatever the capacity
    they were trained with: see `dropless`.

    Args:
        model: whole, in evaluation mode.
        prompts: tokens to continue; an empty one stands for the beginning of a document.
        sampling: how tokens are drawn.
        max_new_tokens: the most to yield per prompt.
        seed: of the draws.
        end_of_document: token that ends a text when it is drawn; not yielded.
        max_length: the most tokens that the model sees (S). Of a longer prompt it sees the end; a
            text that outgrows this is cut to its last S / 2 tokens, which are read anew.
    """
    model = dropless(model)
    device = next(model.parameters()).device
    texts = [list(prompt)[-max_length:] or [end_of_document] for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    going_on, cache = list(range(len(texts))), None
    for _ in range(max_new_tokens):
        seen = [texts[i] for i in going_on]
        logits, cache = _read(model, seen, cache, device)
        kept = []
        for row, i in enumerate(going_on):
            token = sampling.draw(logits[row], generators[i])
            if token != end_of_document:
                yield Drawn(i, token)
                texts[i].append(token)
                kept.append(row)
        if not kept:
            return
        if len(kept) < len(going_on):
            going_on = [going_on[row] for row in kept]
            cache = cache.select(torch.tensor(kept, device=device))
        for i in going_on:
            if len(texts[i]) > max_length:
                texts[i] = texts[i][-((max_length + 1) // 2) :]
                cache = None


def _read(
    model: LanguageModel, texts: list[list[int]], cache: Cache | None, device: torch.device
) -> tuple[Tensor, Cache]:
    """Logits [B, V] of the tokens after `texts`, fp64 on the CPU.

    `cache` holds all but the last token of each, or is None if it holds nothing.
    """
    token_mask = None
    if cache is None:
        cache = model.empty_cache()
        longest = max(map(len, texts))
        # Padding goes in front: all texts then end, and go on, at the same place.
        rows = [[0] * (longest - len(text)) + text for text in texts]
        if any(len(text) < longest for text in texts):
            first = torch.tensor([longest - len(text) for text in texts], device=device)
            token_mask = torch.arange(longest, device=device) >= first[:, None]
    else:
        rows = [text[-1:] for text in texts]
    output = model(torch.tensor(rows, device=device), token_mask, cache)
    return output.logits[:, -1].double().cpu(), output.cache


def stream_text(tokenizer: Tokenizer, drawn: Iterable[Drawn]) -> Iterator[tuple[int, str]]:
    """Text of a byte-level BPE's ids as they come, in pieces that end with whole characters.

    Yields index of the prompt and piece; a prompt's pieces concatenated are the text of its ids.
    """
    held: dict[int, list[int]] = {}
    for prompt, token in drawn:
        ids = [*held.pop(prompt, []), token]
        text = tokenizer.decode(ids)
        # A character cut short decodes to U+FFFD.
        if text.endswith("\ufffd"):
            held[prompt] = ids
        else:
            yield prompt, text
    for prompt, ids in held.items():
        yield prompt, tokenizer.decode(ids)
