"""From a model and batches of text to an `Analysis`.

Shapes: B sequences of S tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moa_dist.analyze.heads import HeadSums
from moa_dist.analyze.measures import Counts, entropy, mutual_information, pointwise_information
from moa_dist.analyze.results import HeadResult, LayerHeads, RouterResult, TokenOfExpert
from moa_dist.analyze.selections import Selections
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.objective import Batch
from moa_dist.models.stack import LayerCall, RouterKey
from moa_dist.models.trace import BlockTrace, HeadSummary

Text = Literal["text", "source"]
"""What a model reads or writes, and what it translates."""
Tokens = tuple[Tensor, Tensor]
"""[B, S] int64, and [B, S] bool, false at padding."""
TOP_TOKENS = 10
"""Listed of each expert, at most."""


@dataclass(frozen=True)
class Observations:
    """All that is counted while a model reads."""

    occurrences_V: dict[Text, Tensor]
    """int64, of each token in the text."""
    routers: dict[RouterKey, Selections]
    """What routers chose."""
    attention: dict[tuple[LayerCall, str], HeadSums]
    """Where heads looked, by application of a layer and attention in it; in the order in which they
    are applied."""
    num_encoder_layers: int
    """Distinct layers that are applied to a source; they come first."""
    source_routers: frozenset[RouterKey]
    """Routers of a decoder's attention to the source that route the tokens of the source."""

    def add(self, texts: dict[Text, Tokens], traces: dict[LayerCall, BlockTrace]) -> None:
        """Count a batch, and what the model decided."""
        for text, (tokens, token_mask) in texts.items():
            occurrences_V = self.occurrences_V[text]
            occurrences_V += tokens[token_mask].bincount(minlength=len(occurrences_V))
        for (layer_call, name), heads in self.attention.items():
            layer, _ = layer_call
            _, token_mask = texts[self.text_of_layer(layer)]
            beyond_first = token_mask & (
                torch.arange(token_mask.shape[1], device=token_mask.device) > 0
            )
            trace = traces[layer_call]
            heads.add(trace.heads[name], beyond_first)
        for (layer, name), chosen in self.routers.items():
            tokens, token_mask = texts[self.text_of_router((layer, name))]
            repeats = range(len(chosen.load_RE))
            routings = [traces[layer, repeat].routing[name] for repeat in repeats]
            chosen.add(tokens.flatten(), token_mask.flatten(), routings)

    def text_of_layer(self, layer: int) -> Text:
        """What it is applied to."""
        return "source" if layer < self.num_encoder_layers else "text"

    def text_of_router(self, router: RouterKey) -> Text:
        """Whose tokens choose: a decoder's values are those of the source."""
        layer, _ = router
        return "source" if router in self.source_routers else self.text_of_layer(layer)


@torch.no_grad()
def observe(model: LanguageModel, batches: Iterable[Batch], device: torch.device) -> Observations:
    """Let `model`, in evaluation mode, read the batches, and count what it does."""
    result = _nothing_seen(model, device)
    for batch in batches:
        tokens, token_mask, *rest = inputs = batch.to(device).inputs()
        texts: dict[Text, Tokens] = {"text": _tokens(tokens, token_mask)}
        if rest:
            _, source, source_mask = rest
            texts["source"] = _tokens(source, source_mask)
        result.add(texts, model(*inputs, trace=True).traces)
    return result


def _tokens(tokens: Tensor | None, token_mask: Tensor | None) -> Tokens:
    assert tokens is not None
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask


def _nothing_seen(model: LanguageModel, device: torch.device) -> Observations:
    vocab_size, repeats = model.config.vocab_size, range(model.stack.num_repeats)
    texts: list[Text] = ["text"] if model.encoder is None else ["text", "source"]
    stacks = [model.stack] if model.encoder is None else [model.encoder, model.stack]
    return Observations(
        {text: torch.zeros(vocab_size, dtype=torch.int64, device=device) for text in texts},
        {
            key: Selections(
                vocab_size,
                router.num_experts,
                router.num_groups * router.config.top_k,
                len(repeats),
                device,
            )
            for key, router in model.routers().items()
        },
        {
            ((stack.first_layer + number, repeat), name): HeadSums(attention.num_heads, device)
            for stack in stacks
            for repeat in repeats
            for number, layer in enumerate(stack.blocks())
            for name, attention in layer.attentions().items()
        },
        num_encoder_layers=model.stack.first_layer,
        source_routers=frozenset(
            (model.stack.first_layer + number, f"{name}.{router}")
            for number, layer in enumerate(model.stack.blocks())
            for name, attention in layer.attentions().items()
            for router in attention.key_routers
            if name != "attention"
        ),
    )


def router_results(
    model: LanguageModel, seen: Observations, min_count: int, text_of: Callable[[int], str]
) -> list[RouterResult]:
    """What the routers chose. Tokens that occur less than `min_count` times are not named."""
    results = []
    for (layer, name), chosen in sorted(seen.routers.items()):
        occurrences_V = seen.occurrences_V[seen.text_of_router((layer, name))].cpu().numpy()
        frequent = np.flatnonzero(occurrences_V >= min_count)
        tokens_VE = chosen.tokens_VE.cpu().numpy()
        results.append(
            RouterResult(
                layer=layer,
                router=name,
                num_groups=model.routers()[layer, name].num_groups,
                choices=chosen.choices,
                num_tokens=int(occurrences_V.sum()),
                load=chosen.load_RE.tolist(),
                dropped=chosen.dropped_RE.tolist(),
                together=chosen.together_EE.tolist(),
                common=chosen.common_RR.tolist(),
                distinct=chosen.distinct.tolist(),
                num_frequent=len(frequent),
                information=mutual_information(tokens_VE[frequent]),
                most_information=float(entropy(tokens_VE[frequent].sum(0)) - log(chosen.choices)),
                top_tokens=_top_tokens(
                    tokens_VE, occurrences_V * len(chosen.load_RE), frequent, text_of
                ),
            )
        )
    return results


def _top_tokens(
    tokens_VE: Counts, applications_V: Counts, allowed: Counts, text_of: Callable[[int], str]
) -> list[list[TokenOfExpert]]:
    """Of each expert, among the `allowed` tokens those that prefer it; PMI counts all tokens."""
    pmi_VE = pointwise_information(tokens_VE, allowed)
    lists = []
    for expert, pmi_V in enumerate(pmi_VE.T):
        # By the count where PMI ties, as it does for tokens that choose nothing else.
        best = np.lexsort((-tokens_VE[allowed, expert], -pmi_V))[:TOP_TOKENS]
        lists.append(
            [
                TokenOfExpert(
                    token=token,
                    text=text_of(token),
                    pmi=float(pmi),
                    share=int(tokens_VE[token, expert]) / int(applications_V[token]),
                    count=int(tokens_VE[token, expert]),
                )
                for token, pmi in zip(allowed[best].tolist(), pmi_V[best], strict=True)
                if pmi > 0
            ]
        )
    return lists


def attention_results(seen: Observations) -> list[LayerHeads]:
    """Where the heads looked."""
    return [
        LayerHeads(
            layer=layer,
            repeat=repeat,
            attention=name,
            heads=[
                HeadResult(queries=queries, **dict(zip(HeadSummary._fields, means, strict=True)))
                for queries, means in zip(
                    sums.queries_H.tolist(), sums.means().tolist(), strict=True
                )
            ],
        )
        for ((layer, repeat), name), sums in seen.attention.items()
    ]
