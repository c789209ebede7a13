"""Bytes of what the forward pass keeps for the backward pass, on one rank, line by line.

Each line is a tensor that autograd saves in `moa_dist.models` and `moa_dist.kernels`, for one
micro-batch without padding and routers that choose evenly; `tests/plan/test_activations.py`
compares the sum with what autograd says it saved. Left out is what is small beside these (norms'
means, rotary tables, sums of statistics).

Shapes: T tokens of a micro-batch, D model width, G router groups (heads in SwitchHead), E experts
of a group, K chosen, H heads, d head width, F expert width. `B` is the bytes of an element, or of
an fp32 or wider one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from moa_dist.config.model import (
    DenseAttentionConfig,
    DenseFFNConfig,
    MoAConfig,
    ModelConfig,
    MoEFFNConfig,
    RouterConfig,
    SwitchHeadConfig,
)
from moa_dist.moe.routed_module import RoutedModule
from moa_dist.moe.router import Router
from moa_dist.plan.predicted_traffic import expected_rows
from moa_dist.plan.terms import Factor, Term, term

_INDEX: Factor = ("B", 8)
_KNOWN_BY_RESULT = ("relu",)
"""Their gradient needs their result alone, which the next product keeps anyway."""


@dataclass(frozen=True)
class Batch:
    """What a rank computes on at once."""

    sequences: int
    """Per micro-batch."""
    sequence_length: int
    """Tokens of each."""
    element_bytes: int
    """Of an activation: 2 in bf16, 4, 8 in fp64."""
    cpu_blocked: bool = False
    """Experts take rows in parts, as on CPUs; see `moa_dist.kernels.routed_experts`."""

    @property
    def tokens(self) -> Factor:
        """Of the micro-batch."""
        return ("tokens", self.sequences * self.sequence_length)

    @property
    def element(self) -> Factor:
        """Bytes of an activation."""
        return ("B", self.element_bytes)

    @property
    def wide(self) -> Factor:
        """Bytes of what is at least fp32: routers, and sums of rows."""
        return ("B", max(self.element_bytes, 4))

    @property
    def is_wide(self) -> bool:
        """Activations are fp32 or wider themselves."""
        return self.element_bytes >= 4


def layer_terms(model: ModelConfig, batch: Batch, *, cross: bool = False) -> list[Term]:
    """What one application of a layer keeps, or with `cross` of one that attends to a source."""
    width = ("d_model", model.d_model)
    # The residual, which each norm keeps, and what it makes of it.
    norms = ("kept", 6 if cross else 4)
    stream = term("residual stream and norms", norms, batch.tokens, width, batch.element)
    of_source = _named("cross-attention: ", _attention(model, batch)) if cross else []
    return [stream, *_attention(model, batch), *of_source, *_ffn(model, batch)]


def recomputed_layer_terms(model: ModelConfig, batch: Batch, *, cross: bool = False) -> list[Term]:
    """The same if it is recomputed: its input, and what `moa_dist.models.recompute` keeps.

    These are the chosen experts with their scores, and where scores decide who is dropped, these
    in order.
    """
    terms = [term("input", batch.tokens, ("d_model", model.d_model), batch.element)]
    for name, router, groups, applications in _routers(model):
        times = 2 if cross and name == "attention" else 1
        chosen = ("chosen", groups * router.top_k * applications * times)
        by_score = router.capacity is not None and router.capacity.policy == "probability"
        num_kept = 2 if by_score else 1
        kept_bytes = ("B", num_kept * (_INDEX[1] + batch.wide[1]))
        terms.append(term(f"{name}: choices", batch.tokens, chosen, kept_bytes))
    return terms


def exchange_terms(module: RoutedModule, name: str, num_ranks: int, batch: Batch) -> list[Term]:
    """What one application keeps in addition if rows travel to `num_ranks` ranks and back."""
    lines = []
    for use in module.routed_projections():
        router = module.get_submodule(use.router)
        assert isinstance(router, Router)
        groups, top_k = router.num_groups, router.config.top_k
        rows = expected_rows(
            1,
            num_groups=groups,
            num_experts=router.config.num_experts,
            top_k=top_k,
            num_ranks=num_ranks,
        )
        with_own = num_ranks / (num_ranks - 1)
        there, back = (rows.of(level) * with_own for level in (use.read, use.write))
        width = ("d_out", use.d_out)
        lines += [
            term(f"{name}: indices of rows", batch.tokens, ("rows", there + back), _INDEX),
            term(f"{name}: sums that came back", batch.tokens, ("rows", back), width, batch.wide),
        ]
        if batch.cpu_blocked:
            # They take the place of the rows that were made here, if any were.
            made = {"token": 0, "head": groups, "slot": groups * top_k}[use.read]
            more, width = ("rows", there - made), ("d_in", use.d_in)
            lines.append(
                term(f"{name}: rows that arrived", batch.tokens, more, width, batch.element)
            )
    for router_name in dict.fromkeys(use.router for use in module.routed_projections()):
        router = module.get_submodule(router_name)
        assert isinstance(router, Router)
        slots = ("G x K", router.num_groups * router.config.top_k)
        lines.append(term(f"{name}: plan at home", batch.tokens, slots, _INDEX))
    return lines


def head_terms(model: ModelConfig, batch: Batch) -> list[Term]:
    """The last norm, the logits and their logarithmic softmax."""
    vocabulary = ("vocabulary", model.vocab_size)
    width = ("d_model", model.d_model)
    return [
        term("final norm", _norm(model), batch.tokens, width, batch.element),
        term("logits", batch.tokens, vocabulary, batch.element),
        term("log-softmax of logits", batch.tokens, vocabulary, batch.wide),
    ]


def _norm(model: ModelConfig) -> Factor:
    """Input and result of a stack's last norm, which post-norm has not."""
    return ("kept", 1 if model.norm_placement == "post" else 2)


def working_terms(model: ModelConfig, batch: Batch) -> list[Term]:
    """Passing memory, beyond what is kept, of the hungriest operation: one line.

    Of logits a copy in fp32 and its gradient; of a routed projection, its rows wide, weighted, and
    in the type of an activation.
    """
    wide = batch.wide[1]
    lines = [
        term("logits", batch.tokens, ("vocabulary", model.vocab_size), ("B", 2 * wide)),
        *(
            term(f"{name}'s weighted rows", batch.tokens, ("chosen", chosen), ("d_out", d_out),
                 ("B", 2 * wide + batch.element_bytes))
            for name, chosen, d_out in _weighted(model)
        ),
    ]  # fmt: skip
    return [max(lines, key=lambda line: line.value)]


def kept(
    model: ModelConfig,
    batch: Batch,
    *,
    recompute: bool,
    of_exchange: Mapping[str, list[Term]] = MappingProxyType({}),
) -> list[Term]:
    """All that a forward keeps; with `recompute` also the one layer that is recomputed.

    `of_exchange`: `exchange_terms` of the parts of a layer whose tokens travel. A model that
    translates has as many tokens of each text; its decoder's layer is the one that is recomputed.
    """
    layers, again = _stack(model, batch, recompute, of_exchange)
    if model.objective != "translation":
        return [*layers, *again, *head_terms(model, batch)]
    of_decoder, again = _stack(model, batch, recompute, of_exchange, cross=True)
    width = ("d_model", model.d_model)
    return [
        *_named("encoder: ", layers),
        term("encoder's result and norm", _norm(model), batch.tokens, width, batch.element),
        *_named("decoder: ", of_decoder),
        *again,
        *head_terms(model, batch),
    ]


def _stack(
    model: ModelConfig,
    batch: Batch,
    recompute: bool,
    of_exchange: Mapping[str, list[Term]],
    *,
    cross: bool = False,
) -> tuple[list[Term], list[Term]]:
    """What all layers keep until the backward pass, and what the one keeps that is done again."""
    layers = ("layers", model.num_layers)
    of_layer = [
        *layer_terms(model, batch, cross=cross),
        *chain.from_iterable(of_exchange.values()),
        *(_named("cross-", of_exchange.get("attention", [])) if cross else []),
    ]
    if not recompute:
        return [line.times(*layers) for line in of_layer], []
    between = recomputed_layer_terms(model, batch, cross=cross)
    return [line.times(*layers) for line in between], _named("recomputed: ", of_layer)


def _named(prefix: str, lines: Iterable[Term]) -> list[Term]:
    return [Term(f"{prefix}{line.name}", line.factors) for line in lines]


def _attention(model: ModelConfig, batch: Batch) -> list[Term]:
    attention = model.attention
    match attention:
        case DenseAttentionConfig():
            heads = attention.num_heads
            result = term(
                "attention's result", batch.tokens, ("H x d", heads * attention.d_head),
                batch.element,
            )  # fmt: skip
            return [*_softmax(heads, attention.d_head, batch), result]
        case SwitchHeadConfig():
            heads, router = attention.num_heads, attention.router
            chosen = heads * router.top_k
            return [
                *_softmax(heads, attention.d_head, batch),
                *_router("value router", router, heads, model.d_model, batch),
                *_trip("value experts", chosen, model.d_model, (), attention.d_head, batch),
                *_router("output router", router, heads, model.d_model, batch),
                *_trip(
                    "output experts", chosen, attention.d_head, (), model.d_model, batch, read=heads
                ),
            ]
        case MoAConfig():
            width = attention.heads_per_expert * attention.d_head
            chosen = attention.router.top_k
            D = model.d_model
            return [
                *_softmax(chosen * attention.heads_per_expert, attention.d_head, batch),
                *_router("attention router", attention.router, 1, model.d_model, batch),
                *_trip("query experts", chosen, D, (), width, batch, weighted=False),
                *_trip("output experts", chosen, width, (), D, batch, read=chosen),
            ]


def _softmax(num_heads: int, d_head: int, batch: Batch) -> list[Term]:
    """Queries, keys, values and the result; fused kernels keep no scores, but know no fp64."""
    width = ("H x d", num_heads * d_head)
    lines = [term("queries, keys, values, heads", ("kept", 4), batch.tokens, width, batch.element)]
    if batch.element_bytes == 8 and not batch.cpu_blocked:
        keys = ("keys", batch.sequence_length)
        lines.append(term("attention scores", batch.tokens, ("H", num_heads), keys, batch.element))
    return lines


def _ffn(model: ModelConfig, batch: Batch) -> list[Term]:
    ffn = model.ffn
    match ffn:
        case DenseFFNConfig():
            kept = _hidden(ffn.activation, ffn.gated)
            hidden = ("d_ff", ffn.d_ff)
            return [term("hidden", ("kept", kept), batch.tokens, hidden, batch.element)]
        case MoEFFNConfig():
            # In parts, products before the activation alone, which is then done again.
            kept = (1 + ffn.gated) if batch.cpu_blocked else _hidden(ffn.activation, ffn.gated)
            D, hiddens = model.d_model, (("kept", kept), ("d_expert", ffn.d_expert))
            return [
                *_router("FFN router", ffn.router, 1, model.d_model, batch),
                *_trip("FFN experts", ffn.router.top_k, D, hiddens, D, batch),
            ]


def _hidden(activation: str, gated: bool) -> int:
    """How many tensors of the hidden width are kept."""
    before = 0 if activation in _KNOWN_BY_RESULT else 1
    return before + (3 if gated else 1)


def _router(name: str, router: RouterConfig, groups: int, d_model: int, batch: Batch) -> list[Term]:
    """Logits, scores and probabilities of all experts, and a copy of the input in fp32."""
    experts, chosen = ("G x E", groups * router.num_experts), ("G x K", groups * router.top_k)
    width = ("d_model", d_model)
    lines = [
        term(f"{name}: logits, scores, probabilities", ("kept", 3), batch.tokens, experts,
             batch.wide),
        term(f"{name}: choices", batch.tokens, chosen, _INDEX),
        term(f"{name}: plan", batch.tokens, chosen, ("B", 3 * _INDEX[1] + batch.wide[1])),
    ]  # fmt: skip
    if not batch.is_wide:
        lines.append(term(f"{name}: input in fp32", batch.tokens, width, batch.wide))
        lines.append(term(f"{name}: weights in fp32", experts, width, batch.wide))
    return lines


def _trip(
    name: str,
    chosen: int,
    d_in: int,
    hidden: tuple[Factor, ...],
    d_out: int,
    batch: Batch,
    *,
    read: int = 0,
    weighted: bool = True,
) -> list[Term]:
    """Rows on their way through experts: gathered, hidden, and their results.

    `read`: rows per token that were made for this trip alone.
    """
    rows = (batch.tokens, ("chosen", chosen))
    lines = [term(f"{name}: hidden", *rows, *hidden, batch.element)] if hidden else []
    width_in, width_out = ("d_in", d_in), ("d_out", d_out)
    if not batch.cpu_blocked:
        # What is added up is kept as it was and, if so, weighted.
        results = ("kept", 2 if weighted else 1)
        return [
            term(f"{name}: gathered rows", *rows, width_in, batch.element),
            *lines,
            term(f"{name}: results", results, *rows, width_out, batch.wide),
        ]
    if read:
        lines.append(
            term(f"{name}: rows read", batch.tokens, ("read", read), width_in, batch.element)
        )
    if weighted and not hidden and d_out < d_in:  # narrow enough not to be computed again
        lines.append(term(f"{name}: results", *rows, width_out, batch.element))
    return lines


def _weighted(model: ModelConfig) -> list[tuple[str, int, int]]:
    """Name, assignments per token and width of the results of each weighted projection."""
    found = []
    attention, ffn = model.attention, model.ffn
    if isinstance(attention, SwitchHeadConfig):
        found.append(
            ("output experts", attention.num_heads * attention.router.top_k, model.d_model)
        )
    elif isinstance(attention, MoAConfig):
        found.append(("output experts", attention.router.top_k, model.d_model))
    if isinstance(ffn, MoEFFNConfig):
        found.append(("FFN experts", ffn.router.top_k, model.d_model))
    return found


def _routers(model: ModelConfig) -> list[tuple[str, RouterConfig, int, int]]:
    """Part, router, its groups and how often a layer applies it."""
    found = []
    attention, ffn = model.attention, model.ffn
    if isinstance(attention, SwitchHeadConfig):
        found.append(("attention", attention.router, attention.num_heads, 2))
    elif isinstance(attention, MoAConfig):
        found.append(("attention", attention.router, 1, 1))
    if isinstance(ffn, MoEFFNConfig):
        found.append(("ffn", ffn.router, 1, 1))
    return found
