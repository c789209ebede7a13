"""Runs a model on batches of text and collects the contents of an `Analysis`.

Shapes: B sequences of S tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections import defaultdict
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
from moa_dist.models.calls import LayerCall, RouterKey
from moa_dist.models.documents import Documents, first_of_document
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.objective import Batch
from moa_dist.models.trace import BlockTrace, HeadSummary
from moa_dist.moe.router import Router

Text = Literal["text", "source"]
"""The text that a model reads or writes, or the source that it translates."""
Tokens = tuple[Tensor, Tensor]
"""Token ids [B, S] int64 and their mask [B, S] bool, False at padding."""
TOP_TOKENS = 10
"""Maximum number of tokens listed per expert."""


@dataclass(frozen=True)
class Observations:
    """Accumulates counts while a model reads."""

    occurrences_V: dict[Text, Tensor]
    """Occurrences of each token in the text, int64."""
    routers: dict[RouterKey, Selections]
    """Choices of each router."""
    attention: dict[tuple[LayerCall, str], HeadSums]
    """Sums over heads, by layer call and attention within the layer, in order of execution."""
    calls: dict[RouterKey, list[tuple[LayerCall, str]]]
    """Applications of each router: the layer call, and the router's name within the layer."""
    num_encoder_layers: int
    """Number of distinct layers that read the source; they come first."""
    source_routers: frozenset[RouterKey]
    """Routers of a decoder's cross-attention that route the tokens of the source."""
    depths: dict[Text, Tensor]
    """Tokens by the number of applications that they took of the layers that tokens leave, int64;
    empty where all take all."""
    token_sums: dict[str, Tensor]
    """What layers hand on, in numbers; see `LanguageModelOutput`."""

    def add(
        self,
        texts: dict[Text, Tokens],
        traces: dict[LayerCall, BlockTrace],
        documents: Documents | None = None,
    ) -> None:
        """Add the tokens of a batch, of these documents if any, and the model's decisions on it."""
        for text, (tokens, token_mask) in texts.items():
            occurrences_V = self.occurrences_V[text]
            occurrences_V += tokens[token_mask].bincount(minlength=len(occurrences_V))
        for (layer_call, name), heads in self.attention.items():
            layer, _ = layer_call
            _, token_mask = texts[self.text_of_layer(layer)]
            ids = torch.zeros_like(token_mask) if documents is None else documents.ids
            beyond_first = token_mask & ~first_of_document(ids)
            trace = traces[layer_call]
            heads.add(trace.heads[name], beyond_first)
        for text, (_, token_mask) in texts.items():
            self._add_depths(text, token_mask, traces)
        for (layer, name), chosen in self.routers.items():
            tokens, token_mask = texts[self.text_of_router((layer, name))]
            routings = [traces[call].routing[own] for call, own in self.calls[layer, name]]
            chosen.add(tokens.flatten(), token_mask.flatten(), routings)

    def _add_depths(
        self, text: Text, token_mask: Tensor, traces: dict[LayerCall, BlockTrace]
    ) -> None:
        running = [
            trace.running
            for (layer, _), trace in traces.items()
            if trace.running is not None and self.text_of_layer(layer) == text
        ]
        if running:
            depth = torch.stack(running).sum(0)[token_mask]
            counts = depth.bincount(minlength=len(running) + 1)
            self.depths[text] = self.depths[text] + counts if text in self.depths else counts

    def text_of_layer(self, layer: int) -> Text:
        """Return the text that a layer reads."""
        return "source" if layer < self.num_encoder_layers else "text"

    def text_of_router(self, router: RouterKey) -> Text:
        """Return the text whose tokens a router reads: a decoder's values come from the source."""
        layer, _ = router
        return "source" if router in self.source_routers else self.text_of_layer(layer)


@torch.no_grad()
def observe(model: LanguageModel, batches: Iterable[Batch], device: torch.device) -> Observations:
    """Run `model`, which must be in evaluation mode, on the batches and count what it does."""
    result = _nothing_seen(model, device)
    for batch in batches:
        batch = batch.to(device)
        tokens, token_mask, *_ = inputs = batch.inputs()
        texts: dict[Text, Tokens] = {"text": _tokens(tokens, token_mask)}
        if batch.source is not None:
            texts["source"] = _tokens(batch.source, batch.source_mask)
        output = model(*inputs, trace=True)
        result.add(texts, output.traces, batch.documents)
        for name, both in output.token_sums.items():
            result.token_sums[name] = result.token_sums.get(name, 0.0) + both
    return result


def _tokens(tokens: Tensor | None, token_mask: Tensor | None) -> Tokens:
    assert tokens is not None
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask


def _nothing_seen(model: LanguageModel, device: torch.device) -> Observations:
    vocab_size = model.config.vocab_size
    texts: list[Text] = ["text"] if model.encoder is None else ["text", "source"]
    stacks = [model.stack] if model.encoder is None else [model.encoder, model.stack]
    calls: dict[RouterKey, list[tuple[LayerCall, str]]] = defaultdict(list)
    for stack in stacks:
        for planned in stack.plan:
            for name, router_call in planned.routers.items():
                calls[router_call.key].append((planned.call, name))
        first = stack.plan[stack.core.start].call
        calls[stack.depth_call.key].append((first, stack.depth_call.router))
    return Observations(
        {text: torch.zeros(vocab_size, dtype=torch.int64, device=device) for text in texts},
        {
            key: Selections(
                vocab_size,
                router.num_experts,
                router.num_groups * router.config.experts_per_token(training=False).most,
                len(calls[key]),
                device,
            )
            for key, router in model.routers().items()
        },
        {
            (planned.call, name): HeadSums(attention.num_heads, device)
            for stack in stacks
            for planned in stack.plan
            for name, attention in stack.block(planned).attentions().items()
        },
        calls,
        num_encoder_layers=model.stack.first_layer,
        source_routers=frozenset(
            (model.stack.first_layer + number, f"{name}.{router}")
            for number, layer in enumerate(model.stack.blocks())
            for name, attention in layer.attentions().items()
            for router in attention.key_routers
            if name != "attention"
        ),
        depths={},
        token_sums={},
    )


def router_results(
    model: LanguageModel, seen: Observations, min_count: int, text_of: Callable[[int], str]
) -> list[RouterResult]:
    """Summarize the routers' choices; tokens must occur `min_count` times to be named."""
    results = []
    for (layer, name), chosen in sorted(seen.routers.items()):
        occurrences_V = seen.occurrences_V[seen.text_of_router((layer, name))].cpu().numpy()
        frequent = np.flatnonzero(occurrences_V >= min_count)
        choices = _choices(model.routers()[layer, name], chosen, int(occurrences_V.sum()))
        tokens_VE = chosen.tokens_VE.cpu().numpy()
        results.append(
            RouterResult(
                layer=layer,
                router=name,
                num_groups=model.routers()[layer, name].num_groups,
                choices=choices,
                num_tokens=int(occurrences_V.sum()),
                load=chosen.load_RE.tolist(),
                dropped=chosen.dropped_RE.tolist(),
                together=chosen.together_EE.tolist(),
                common=chosen.common_RR.tolist(),
                distinct=chosen.distinct.tolist(),
                num_frequent=len(frequent),
                information=mutual_information(tokens_VE[frequent]),
                most_information=float(entropy(tokens_VE[frequent].sum(0)) - log(choices)),
                top_tokens=_top_tokens(
                    tokens_VE, occurrences_V * len(chosen.load_RE), frequent, text_of
                ),
            )
        )
    return results


def _choices(router: Router, chosen: Selections, num_tokens: int) -> int:
    """Return how many choices a token makes per repeat; where that varies, the rounded mean."""
    mean, most = router.config.experts_per_token(training=False)
    if mean == most:
        return router.num_groups * most
    return max(1, round(chosen.load_RE.sum().item() / max(num_tokens * len(chosen.load_RE), 1)))


def _top_tokens(
    tokens_VE: Counts, applications_V: Counts, allowed: Counts, text_of: Callable[[int], str]
) -> list[list[TokenOfExpert]]:
    """List the `allowed` tokens that prefer each expert; the PMI is computed over all tokens."""
    pmi_VE = pointwise_information(tokens_VE, allowed)
    lists = []
    for expert, pmi_V in enumerate(pmi_VE.T):
        # Ties in PMI, as among tokens that choose nothing else, are broken by the count.
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


def depth_results(seen: Observations) -> dict[str, list[int]]:
    """Return how many tokens took how many applications, by text."""
    return {text: counts.tolist() for text, counts in seen.depths.items()}


def token_mean_results(seen: Observations) -> dict[str, float]:
    """Return means over tokens of what layers hand on, by name."""
    return {
        name: (total / number.clamp(min=1)).item()
        for name, (total, number) in seen.token_sums.items()
    }


def attention_results(seen: Observations) -> list[LayerHeads]:
    """Summarize where the heads looked."""
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
