"""Translating texts: beam search with a length penalty, all hypotheses of a batch at once.

Each token is read once: keys and values of source and hypotheses are kept, and follow the
hypotheses that go on. The score of a finished hypothesis is its log-probability over its number of
tokens to the power of the length penalty, ends included in both.

Shapes: R hypotheses that go on, of all texts of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.data.batches import padded
from moa_dist.evaluate.trained import Trained, require
from moa_dist.models.cache import Cache
from moa_dist.models.language_model import LanguageModel, dropless

Progress = Callable[[int, int], None]
"""Called with texts done, and all texts."""

_EXTRA_TOKENS = 50
"""A translation is at most so many tokens longer than its source (Vaswani et al. 2017, 6.1)."""


class Search(NamedTuple):
    """How to search."""

    beam: int = 4
    """Hypotheses per text that go on (k)."""
    length_penalty: float = 0.6
    """Above 0 favours longer translations."""


class Hypothesis(NamedTuple):
    """A translation, or the beginning of one."""

    tokens: tuple[int, ...]
    """Without the token that ends it."""
    log_probability: float
    """Of its tokens, and of its end if it is finished, nats."""


@dataclass
class _Beam:
    """The search for the translation of one text."""

    max_tokens: int
    going_on: list[Hypothesis] = field(default_factory=lambda: [Hypothesis((), 0.0)])
    best: tuple[float, Hypothesis] | None = None
    num_finished: int = 0

    def finish(self, hypothesis: Hypothesis, length_penalty: float) -> None:
        score = hypothesis.log_probability / (len(hypothesis.tokens) + 1) ** length_penalty
        if self.best is None or score > self.best[0]:
            self.best = score, hypothesis
        self.num_finished += 1

    def extend(
        self, continuations: list[tuple[float, int, int]], search: Search, end: int
    ) -> list[int]:
        """Go on with the best of (log-probability, which of `going_on`, token).

        Returns which hypotheses, by their index before, the new ones continue; none when the
        search is over.
        """
        before, self.going_on, parents = self.going_on, [], []
        ranked = sorted(continuations, reverse=True)
        for place, (log_probability, parent, token) in enumerate(ranked):
            tokens = before[parent].tokens
            if token == end:
                if place < search.beam:
                    self.finish(Hypothesis(tokens, log_probability), search.length_penalty)
            elif len(self.going_on) < search.beam:
                self.going_on.append(Hypothesis((*tokens, token), log_probability))
                parents.append(parent)
        too_long = not self.going_on or len(self.going_on[0].tokens) >= self.max_tokens
        if self.num_finished >= search.beam or too_long:
            if self.best is None:  # none came to an end: cut the likeliest
                self.finish(self.going_on[0], search.length_penalty)
            return []
        return parents


@torch.no_grad()
def beam_search(
    model: LanguageModel, sources: Sequence[Sequence[int]], search: Search, *, end: int
) -> list[Hypothesis]:
    """The translation found of each source, given as token ids without their end.

    Args:
        model: whole, in evaluation mode, trained to translate. Experts drop nothing here: see
            `dropless`.
        sources: at least one, none of them empty.
        search: how to search.
        end: token that ends texts, and begins targets.
    """
    model = dropless(model)
    device = next(model.parameters()).device
    source, source_mask = (
        None if x is None else x.to(device) for x in padded([[*text, end] for text in sources])
    )
    beams = [_Beam(len(text) + _EXTRA_TOKENS) for text in sources]
    cache, last = model.empty_cache(), [end] * len(sources)
    searching = list(beams)
    while searching:
        log_probability, token, cache = _read(
            model, last, cache, source, source_mask, 2 * search.beam
        )
        source = source_mask = None  # from here on, they are in the cache
        rows, row, still = [], 0, []
        for beam in searching:
            size = len(beam.going_on)
            continuations = [
                (hypothesis.log_probability + more, i, which)
                for i, hypothesis in enumerate(beam.going_on)
                for more, which in zip(log_probability[row + i], token[row + i], strict=True)
            ]
            parents = beam.extend(continuations, search, end)
            rows += [row + parent for parent in parents]
            row += size
            if parents:
                still.append(beam)
        searching = still
        last = [hypothesis.tokens[-1] for beam in searching for hypothesis in beam.going_on]
        cache = cache.select(torch.tensor(rows, dtype=torch.int64, device=device))
    return [beam.best[1] for beam in beams if beam.best is not None]


def _read(
    model: LanguageModel,
    last: list[int],
    cache: Cache,
    source: Tensor | None,
    source_mask: Tensor | None,
    num_best: int,
) -> tuple[list[list[float]], list[list[int]], Cache]:
    """Of each hypothesis the likeliest next tokens, [R, num_best]: log-probabilities and ids."""
    device = next(model.parameters()).device
    tokens = torch.tensor(last, device=device)[:, None]
    output = model(tokens, None, cache, source, source_mask)
    log_probability = output.logits[:, -1].double().log_softmax(-1)
    best = log_probability.topk(min(num_best, log_probability.shape[-1]), dim=-1)
    assert output.cache is not None
    return best.values.tolist(), best.indices.tolist(), output.cache


def translate(
    trained: Trained,
    texts: Sequence[str],
    search: Search,
    *,
    batch: int,
    progress: Progress | None = None,
) -> list[str]:
    """Translate texts, in their order; an empty one stays empty.

    Texts of similar length share a batch of `batch`. Collective if a process group exists: every
    rank brings the same texts, takes each W-th batch, and gets all translations.

    Raises:
        DataError: the model was not trained to translate, or a text cannot be encoded.
    """
    require(trained, "translation", "to translate")
    ranked = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
    sources = trained.tokenizer.encode_batch(texts)
    order = sorted((i for i, text in enumerate(sources) if text), key=lambda i: -len(sources[i]))
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    end, found = trained.tokenizer.end_of_document, {}
    for number, chosen in enumerate(batches):
        if number % world_size == rank:
            best = beam_search(trained.model, [sources[i] for i in chosen], search, end=end)
            for i, hypothesis in zip(chosen, best, strict=True):
                found[i] = trained.tokenizer.decode(hypothesis.tokens)
        if progress is not None:
            progress(min((number + 1) * batch, len(order)), len(order))
    if ranked:
        everywhere: list[dict[int, str]] = [{}] * world_size
        dist.all_gather_object(everywhere, found)
        found = {i: text for part in everywhere for i, text in part.items()}
    return [found.get(i, "") for i in range(len(texts))]
