"""Sampling a continuation, one token at a time.

Shapes: S tokens that the model sees, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moa_dist.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end_of_document: int,
    max_length: int,
) -> Iterator[int]:
    """Continue a prompt, yielding each token as soon as it is drawn.

    The same arguments give the same tokens, whatever else draws random numbers. Each token
    takes a forward over all the tokens that the model sees.

    Args:
        model: a `LanguageModel` in evaluation mode.
        prompt_ids: tokens to continue; empty for the beginning of a document.
        max_new_tokens: the most to yield.
        temperature: divides the logits; 0 takes the most probable token every time.
        top_p: draw from the fewest tokens that together have this probability (Holtzman et
            al. 2020, section 3.1); 1 draws from all of them.
        seed: of the draws.
        end_of_document: token that ends the text when it is drawn; not yielded.
        max_length: tokens that the model sees, the last ones (S).
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    context = list(prompt_ids) or [end_of_document]
    for _ in range(max_new_tokens):
        context = context[-max_length:]
        output = model(torch.tensor([context], device=device))
        token = _draw(output.logits[0, -1].double().cpu(), temperature, top_p, generator)
        if token == end_of_document:
            return
        yield token
        context.append(token)


def _draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    # The maximum goes first: a tiny temperature must not make it infinite.
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    ordered_V, ids_V = probabilities_V.sort(descending=True, stable=True)
    more_probable_V = ordered_V.cumsum(0) - ordered_V
    more_probable_V[0] = -1.0  # the first is kept even when top_p is 0
    kept_V = ordered_V.where(more_probable_V < top_p, 0.0)
    return int(ids_V[torch.multinomial(kept_V, 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of a byte-level BPE's ids as they come, in pieces that end with whole characters.

    The pieces concatenated are the text of all ids.
    """
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        # A character cut short decodes to U+FFFD.
        if not text.endswith("\ufffd"):
            yield text
            held = []
    yield tokenizer.decode(held)
