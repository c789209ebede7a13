"""Translates texts by beam search with a length penalty, all hypotheses of a batch at once.

Each token is read once: keys and values of sources and hypotheses are cached, and reordered along
with the live hypotheses. The score of a finished hypothesis is its log-probability divided by its
number of tokens to the power of the length penalty, both including the end token.

Shapes: R live hypotheses of all texts in a batch, V vocabulary.
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
"""Called with (texts done, total texts)."""

_EXTRA_TOKENS = 50
"""Maximum tokens by which a translation exceeds its source (Vaswani et al. 2017, 6.1)."""


class Search(NamedTuple):
    """Configures the beam search."""

    beam: int = 4
    """Live hypotheses per text (k)."""
    length_penalty: float = 0.6
    """Exponent of the length; above 0 favors longer translations."""


class Hypothesis(NamedTuple):
    """Holds a translation, or the start of one."""

    tokens: tuple[int, ...]
    """Token ids, without the end token."""
    log_probability: float
    """Log-probability of the tokens, and of the end token if finished, in nats."""


@dataclass
class _Beam:
    """Holds the state of the search for one text."""

    max_tokens: int
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis((), 0.0)])
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
        """Keep the best continuations, given as (log-probability, index in `live`, token).

        Returns the index in the previous `live` that each new hypothesis extends; empty when the
        search is over.
        """
        before, self.live, parents = self.live, [], []
        ranked = sorted(continuations, reverse=True)
        for position, (log_probability, parent, token) in enumerate(ranked):
            tokens = before[parent].tokens
            if token == end:
                if position < search.beam:
                    self.finish(Hypothesis(tokens, log_probability), search.length_penalty)
            elif len(self.live) < search.beam:
                self.live.append(Hypothesis((*tokens, token), log_probability))
                parents.append(parent)
        too_long = not self.live or len(self.live[0].tokens) >= self.max_tokens
        if self.num_finished >= search.beam or too_long:
            if self.best is None:  # none has finished: truncate the likeliest
                self.finish(self.live[0], search.length_penalty)
            return []
        return parents


@torch.no_grad()
def beam_search(
    model: LanguageModel, sources: Sequence[Sequence[int]], search: Search, *, end: int
) -> list[Hypothesis]:
    """Translate each source, given as token ids without the end token.

    Args:
        model: the whole model, in evaluation mode, trained to translate. Experts drop nothing
            here: see `dropless`.
        sources: at least one source, none of them empty.
        search: how to search.
        end: token that ends texts and starts targets.
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
        source = source_mask = None  # cached from now on
        rows, row, still = [], 0, []
        for beam in searching:
            size = len(beam.live)
            continuations = [
                (hypothesis.log_probability + more, i, which)
                for i, hypothesis in enumerate(beam.live)
                for more, which in zip(log_probability[row + i], token[row + i], strict=True)
            ]
            parents = beam.extend(continuations, search, end)
            rows += [row + parent for parent in parents]
            row += size
            if parents:
                still.append(beam)
        searching = still
        last = [hypothesis.tokens[-1] for beam in searching for hypothesis in beam.live]
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
    """Return log-probabilities and ids of the likeliest tokens, [R, num_best], and the cache."""
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
    """Translate texts, in order; an empty text stays empty.

    Texts of similar length share a batch of size `batch`. Collective if a process group exists:
    every rank passes the same texts, translates every W-th batch, and gets all translations.

    Raises:
        DataError: the model was not trained to translate, or a text cannot be encoded.
    """
    require(trained, "translation", "translating")
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
