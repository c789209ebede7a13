"""Upcycles a dense model to a model with experts, which keeps what the dense one has learned.

Komatsuzaki et al. 2022 (arXiv 2212.05055) copy a dense FFN into every expert; He et al. 2024 (arXiv
2410.07524, "virtual groups") cut it into m slices and copy those, so that experts stay small. One
rule covers both, with m = 1 for whole copies: expert e holds slice e mod m, and the m experts of
a group share one row of the router, so that tokens choose whole groups. Attention is copied whole.

    FFN         sum over c chosen groups of w_g (sum of m slices) = (sum of w) / m  FFN(x)
    MoA         sum over chosen of w_e  O attention(Q x, K, V)    = (sum of w)      attention(x)
    SwitchHead  values and outputs, head by head                  = (sum of w)      V x, O r

Dividing by the factor preserves the function, exactly if the chosen weights sum to one for every
token. Otherwise, as with raw sigmoids, the router is initialized ten times smaller, so that the sum
hardly varies, and the factor is its mean over random inputs of the layer. If `top_k` is not a
multiple of m, a token gets only some slices, and only the mean over tokens is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from moa_dist.config.model import (
    PARTS,
    DenseAttentionConfig,
    DenseFFNConfig,
    MoAConfig,
    ModelConfig,
    MoEFFNConfig,
    PartConfig,
    SwitchHeadConfig,
)
from moa_dist.config.routers import RouterConfig
from moa_dist.errors import Problem
from moa_dist.models.attention import DenseAttention
from moa_dist.models.block import Block
from moa_dist.models.feed_forward import DenseFeedForward, MoEFeedForward
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.moa import MoAAttention
from moa_dist.models.switchhead import SwitchHeadAttention
from moa_dist.moe.router import Router, RouterLogits

_SAMPLE = 4096
"""Number of random tokens over which weights are averaged."""
_EVEN = 0.1
"""Scale of a router whose weights should hardly vary; its choice of experts does not change."""


_HEADS_FIELD: dict[type[PartConfig], str | None] = {
    MoAConfig: "heads_per_expert",
    SwitchHeadConfig: "num_heads",
    MoEFFNConfig: None,
}
"""Kinds that a dense part can be upcycled to, with the field of the number of heads, if any."""


class UpcycledPart(NamedTuple):
    """Describes how attention or FFN was upcycled."""

    name: str
    """`attention` or `ffn`."""
    exact: bool
    """Whether it computes the same as before, as long as no tokens are dropped."""
    how: str
    """One-line description."""


def problems_of(dense: ModelConfig, config: ModelConfig) -> Iterator[Problem]:
    """Yield each reason why `dense` cannot be upcycled to `config`."""
    for name in ModelConfig.model_fields:
        before, now = getattr(dense, name), getattr(config, name)
        if name not in PARTS and before != now:
            now, before = ("null" if value is None else value for value in (now, before))
            text = f"`model.{name}` is {now}, but {before} in the dense model; make them equal"
            yield Problem(text, (f"model.{name}",), {f"model.{name}": [getattr(dense, name)]})
    if config.sharing.is_partial:
        yield Problem(
            "`model.sharing` shares layers by part, which cannot be upcycled; upcycle a model with "
            "distinct layers, and share them with `moa-dist share`",
            ("model.sharing",),
        )
    changed = [name for name in PARTS if getattr(dense, name) != getattr(config, name)]
    if not changed:
        text = (
            "`model.attention` and `model.ffn` equal those of the dense model: nothing to upcycle"
        )
        yield Problem(text, ("model.attention", "model.ffn"))
    for name in changed:
        before, now = getattr(dense, name), getattr(config, name)
        if before.kind != "dense":
            yield Problem(
                f"`model.{name}` of the run is {before.kind}, but only dense layers can be "
                "upcycled; keep its settings unchanged",
                (f"model.{name}",),
                {f"model.{name}": [before]},
            )
        elif now.kind == "dense":
            yield Problem(
                f"`model.{name}` is dense, but its settings differ from the run's; keep them "
                "unchanged, or choose a kind with experts",
                (f"model.{name}",),
                {f"model.{name}": [before]},
            )
        elif type(now) not in _HEADS_FIELD:
            kinds = [str(kind.model_fields["kind"].default) for kind in _HEADS_FIELD]
            yield Problem(
                f"`model.{name}.kind` is {now.kind}, which a dense part cannot be upcycled to; use "
                + ", ".join(kinds),
                (f"model.{name}.kind",),
                {f"model.{name}.kind": kinds},
            )
        of_known_kind = now.routers if type(now) in _HEADS_FIELD else {}
        for field, router in of_known_kind.items():
            if router.kind != "topk":
                key = f"model.{name}.{field}.kind"
                text = f"`{key}` is {router.kind}, but an upcycled part needs topk"
                yield Problem(text, (key,), {key: ["topk"]})
    if "attention" in changed and isinstance(dense.attention, DenseAttentionConfig):
        yield from _attention_problems(dense.attention, config)
    if isinstance(dense.ffn, DenseFFNConfig) and isinstance(config.ffn, MoEFFNConfig):
        yield from _ffn_problems(dense.ffn, config.ffn)


def _attention_problems(dense: DenseAttentionConfig, config: ModelConfig) -> Iterator[Problem]:
    attention = config.attention
    heads = _HEADS_FIELD.get(type(attention))
    if heads is None:
        return
    if dense.kv_heads < dense.num_heads or dense.qk_norm:
        yield Problem(
            "attention of the dense model shares keys and values among heads, or normalizes them; "
            "neither can be upcycled",
            ("model.attention",),
        )
    wanted = {
        heads: dense.num_heads,
        "d_head": dense.d_head,
        "rope": dense.rope,
        "window": dense.window,
        "soft_cap": dense.soft_cap,
        "qk_norm": False,
        "shared_experts": 0,
        "relative_positions": None,
    }
    yield from _routing_problems("model.attention", attention)
    for name, value in wanted.items():
        if getattr(attention, name, value) != value:
            yield Problem(
                f"`model.attention.{name}` is {getattr(attention, name)}; copies of the dense "
                f"attention need {value}",
                (f"model.attention.{name}",),
                {f"model.attention.{name}": [value]},
            )


def _routing_problems(path: str, part: PartConfig) -> Iterator[Problem]:
    """Copies must add up to what they are copies of."""
    for name, router in part.routers.items():
        for field, value in (("route_scale", 1.0), ("group_limit", None)):
            if getattr(router, field) != value:
                key = f"{path}.{name}.{field}"
                yield Problem(
                    f"`{key}` is set, but copies of a dense part need "
                    f"{'null' if value is None else value}",
                    (key,),
                    {key: [value]},
                )


def _ffn_problems(dense: DenseFFNConfig, ffn: MoEFFNConfig) -> Iterator[Problem]:
    yield from _routing_problems("model.ffn", ffn)
    if ffn.shared_expert is not None:
        yield Problem(
            "`model.ffn.shared_expert` is set, but the dense FFN is copied into the routed experts",
            ("model.ffn.shared_expert",),
            {"model.ffn.shared_expert": [None]},
        )
    for name in ("activation", "gated"):
        if getattr(ffn, name) != getattr(dense, name):
            yield Problem(
                f"`model.ffn.{name}` is {getattr(ffn, name)}, but {getattr(dense, name)} in the "
                "dense model; make them equal",
                (f"model.ffn.{name}",),
                {f"model.ffn.{name}": [getattr(dense, name)]},
            )
    slices, rest = divmod(dense.d_ff, ffn.d_expert)
    if rest or ffn.router.num_experts % slices:
        yield Problem(
            f"`model.ffn`: {ffn.router.num_experts} experts of width {ffn.d_expert} are not whole "
            f"copies of an FFN of width {dense.d_ff}; choose `d_expert` so that {dense.d_ff} = "
            "m x `d_expert`, and `router.num_experts` as a multiple of m",
            ("model.ffn.d_expert", "model.ffn.router.num_experts"),
        )


@torch.no_grad()
def upcycle(
    dense: LanguageModel, config: ModelConfig, *, seed: int = 0
) -> tuple[LanguageModel, list[UpcycledPart]]:
    """Build a model of `config` from the weights of `dense`, and describe what was done.

    `problems_of` must find no problems. The dtype is that of `dense`. Parameters without a
    counterpart there, mainly routers, are initialized from `seed`.
    """
    dtype = dense.embedding.weight.dtype
    model = build_model(config, seed=seed).to(dtype)
    state, before = model.state_dict(), dense.state_dict()
    for name in state.keys() & before.keys():
        if state[name].shape == before[name].shape:  # all but what becomes experts
            state[name].copy_(before[name])
    parts: dict[str, UpcycledPart] = {}
    for new, old in zip(_layers(model), _layers(dense), strict=True):
        for part in _fill(new, old, _norm_of_source(model)):
            parts[part.name] = part
    return model.eval(), list(parts.values())


def _layers(model: LanguageModel) -> list[Block]:
    stacks = [model.stack] if model.encoder is None else [model.encoder, model.stack]
    return [cast(Block, layer) for stack in stacks for layer in stack.layers]


def _norm_of_source(model: LanguageModel) -> nn.Module | None:
    """Return the norm whose output a decoder's cross-attention reads."""
    if model.encoder is None or model.config.norm_placement != "post":
        return model.encoder_norm
    return cast(Block, model.encoder.layers[-1]).ffn_norm


def _fill(new: Block, old: Block, norm_of_source: nn.Module | None) -> Iterator[UpcycledPart]:
    """Fill the experts of one layer."""
    norms = [new.attention_norm, new.ffn_norm]
    if new.cross is not None:
        norms.insert(1, new.cross.norm)
    if new.placement == "post":  # the input of a part is normalized after the previous part
        norms = [norms[-1], *norms[:-1]]
    yield from _fill_attention(new.attention, old.attention, norms[0], norms[0])
    if new.cross is not None and old.cross is not None and norm_of_source is not None:
        yield from _fill_attention(
            new.cross.attention, old.cross.attention, norms[1], norm_of_source
        )
    match new.ffn, old.ffn:
        case MoEFeedForward(), DenseFeedForward():
            yield _fill_ffn(new.ffn, old.ffn, norms[-1])


def _fill_attention(
    new: nn.Module, old: nn.Module, norm_of_queries: nn.Module, norm_of_keys: nn.Module
) -> Iterator[UpcycledPart]:
    match new, old:
        case MoAAttention(), DenseAttention():
            yield _fill_moa(new, old, norm_of_queries)
        case SwitchHeadAttention(), DenseAttention():
            yield _fill_switchhead(new, old, norm_of_queries, norm_of_keys)


def _fill_moa(new: MoAAttention, old: DenseAttention, norm: nn.Module) -> UpcycledPart:
    for ours, theirs in ((new.k, old.k), (new.v, old.v)):
        ours.weight.copy_(theirs.weight)
    new.q.weight.copy_(old.q.weight.T)
    new.o.weight.copy_(old.o.weight.T / _even_out(new.router, norm))
    exact = _sums_to_one(new.router.config)
    return UpcycledPart(
        "attention", exact, _how("queries and outputs copied into every expert", exact)
    )


def _fill_switchhead(
    new: SwitchHeadAttention,
    old: DenseAttention,
    norm_of_queries: nn.Module,
    norm_of_keys: nn.Module,
) -> UpcycledPart:
    new.q.weight.copy_(old.q.weight)
    new.k.weight.copy_(old.k.weight)
    H = new.config.num_heads
    v_HDd = old.v.weight.unflatten(0, (H, -1)).mT
    o_HdD = old.o.weight.T.unflatten(0, (H, -1))
    for experts, matrices, router, norm in (
        (new.v, v_HDd, new.value_router, norm_of_keys),
        (new.o, o_HdD, new.output_router, norm_of_queries),
    ):
        matrices = matrices / _even_out(router, norm)[:, None, None]
        experts.weight.copy_(matrices.repeat_interleave(router.config.num_experts, 0))
    exact = _sums_to_one(new.config.router)
    how = "each head's values and outputs copied into its experts"
    return UpcycledPart("attention", exact, _how(how, exact))


def _fill_ffn(new: MoEFeedForward, old: DenseFeedForward, norm: nn.Module) -> UpcycledPart:
    router, d_expert = new.router.config, new.config.d_expert
    num_slices = old.up.out_features // d_expert
    num_groups = router.num_experts // num_slices
    whole_groups = router.top_k % num_slices == 0
    if whole_groups:
        rows = _logits(new.router)
        rows.copy_(rows[::num_slices].repeat_interleave(num_slices, 0))
    for experts, linear in ((new.up, old.up), (new.gate, old.gate)):
        if experts is not None and linear is not None:
            slices = linear.weight.unflatten(0, (num_slices, d_expert)).mT
            experts.weight.copy_(slices.repeat(num_groups, 1, 1))
    scale = num_slices / _even_out(new.router, norm)
    slices = old.down.weight.T.unflatten(0, (num_slices, d_expert)) * scale
    new.down.weight.copy_(slices.repeat(num_groups, 1, 1))
    how = "copied into every expert"
    if num_slices > 1:
        how = f"cut into {num_slices} slices, {num_groups} experts of each"
    if not whole_groups:
        how += f", of which a token takes {router.top_k}"
    exact = whole_groups and _sums_to_one(router)
    return UpcycledPart("ffn", exact, _how(how, exact))


def _how(how: str, exact: bool) -> str:
    return f"{how}; {'exact' if exact else 'approximate: compare the losses'}"


def _sums_to_one(router: RouterConfig) -> bool:
    """Return whether the weights of a token's experts sum to one for every token."""
    everything = router.score == "softmax" and router.top_k == router.num_experts
    return router.gate != "raw" or everything


def _logits(router: Router) -> Tensor:
    """Return the weights [outputs, D] of a router whose logits are linear."""
    assert isinstance(router.logits, RouterLogits)
    return router.logits.weight


def _even_out(router: Router, norm: nn.Module) -> Tensor:
    """Return the sum of a token's weights, averaged over random inputs after `norm`, [G].

    If the sum varies from token to token, scale the router down first.
    """
    if _sums_to_one(router.config):
        return torch.ones(router.num_groups, dtype=_logits(router).dtype)
    _logits(router).mul_(_EVEN)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _SAMPLE, _logits(router).shape[1], generator=generator)
    weights = router.eval()(norm(x.to(_logits(router)))).topk_weights
    return weights.sum(-1).mean(0)
