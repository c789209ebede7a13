"""Upcycles dense models to a model with experts, which keeps what the dense ones have learned.

Komatsuzaki et al. 2022 (arXiv 2212.05055) copy a dense FFN into every expert; He et al. 2024 (arXiv
2410.07524, "virtual groups") cut it into m slices and copy those, so that experts stay small. One
rule covers both, with m = 1 for whole copies: expert e holds slice e mod m, and the m experts of
a group share one row of the router, so that tokens choose whole groups. Attention is copied whole.

    FFN         sum over c chosen groups of w_g (sum of m slices) = (sum of w) / m  FFN(x)
    MoA         sum over chosen of w_e  O attention(Q x, K, V)    = (sum of w)      attention(x)
    SwitchHead  values and outputs, head by head                  = (sum of w)      V x, O r
    MoH         sum over chosen of w_e  attention(x)              = (sum of w)      attention(x)

Dividing by the factor preserves the function, exactly if the chosen weights sum to one for every
token. Otherwise, as with raw sigmoids, the router is initialized ten times smaller, so that the sum
hardly varies, and the factor is its mean over random inputs of the layer. If `top_k` is not a
multiple of m, a token gets only some slices, and only the mean over tokens is right.

Several models, trained apart, are dealt to the experts (or groups) in turn, and everything else is
their mean: branch-train-mix (Sukhbaatar et al. 2024, arXiv 2403.07816) for the FFN, BAM (Zhang et
al. 2024, arXiv 2408.08274) for both parts. Where a token takes all experts, a layer then computes
`sum of w_e FFN_e(x)`, and with MoH, whose experts have keys and values of their own,
`sum of w_e attention_e(x)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.routers import RouterConfig
from moa_dist.models.attention import DenseAttention
from moa_dist.models.block import Block
from moa_dist.models.feed_forward import DenseFeedForward, MoEFeedForward
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.moa import MoAAttention
from moa_dist.models.moh import MoHAttention
from moa_dist.models.switchhead import SwitchHeadAttention
from moa_dist.moe.router import Router
from moa_dist.moe.router_logits import RouterLogits

_SAMPLE = 4096
"""Number of random tokens over which weights are averaged."""
_EVEN = 0.1
"""Scale of a router whose weights should hardly vary; its choice of experts does not change."""


class UpcycledPart(NamedTuple):
    """Describes how attention or FFN was upcycled."""

    name: str
    """`attention` or `ffn`."""
    exact: bool
    """Whether it computes the same as before (of equal models), if no tokens are dropped."""
    how: str
    """One-line description."""


@torch.no_grad()
def upcycle(
    dense: LanguageModel,
    config: ModelConfig,
    *,
    others: Sequence[LanguageModel] = (),
    seed: int = 0,
) -> tuple[LanguageModel, list[UpcycledPart]]:
    """Build a model of `config` from the weights of dense models, and describe what was done.

    `upcycle_checks.problems_of` must find no problems. The dtype is that of `dense`. Parameters
    without a counterpart there, mainly routers, are initialized from `seed`.
    """
    dtype, models = dense.embedding.weight.dtype, [dense, *others]
    model = build_model(config, seed=seed).to(dtype)
    state, before = model.state_dict(), [each.state_dict() for each in models]
    for name in state.keys() & before[0].keys():
        if state[name].shape == before[0][name].shape:  # all but what becomes experts
            state[name].copy_(torch.stack([each[name] for each in before]).mean(0))
    parts: dict[str, UpcycledPart] = {}
    for new, *old in zip(_layers(model), *map(_layers, models), strict=True):
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


def _fill(
    new: Block, old: Sequence[Block], norm_of_source: nn.Module | None
) -> Iterator[UpcycledPart]:
    """Fill the experts of one layer from those layers of all models."""
    norms = [new.attention_norm, new.ffn_norm]
    if new.cross is not None:
        norms.insert(1, new.cross.norm)
    if new.placement == "post":  # the input of a part is normalized after the previous part
        norms = [norms[-1], *norms[:-1]]
    attention = [layer.attention for layer in old]
    yield from _fill_attention(new.attention, attention, norms[0], norms[0])
    if new.cross is not None and norm_of_source is not None:
        attention = [layer.cross.attention for layer in old if layer.cross is not None]
        yield from _fill_attention(new.cross.attention, attention, norms[1], norm_of_source)
    ffns = [layer.ffn for layer in old if isinstance(layer.ffn, DenseFeedForward)]
    if isinstance(new.ffn, MoEFeedForward) and ffns:
        yield _fill_ffn(new.ffn, ffns, norms[-1])


def _fill_attention(
    new: nn.Module,
    old: Sequence[nn.Module],
    norm_of_queries: nn.Module,
    norm_of_keys: nn.Module,
) -> Iterator[UpcycledPart]:
    dense = [layer for layer in old if isinstance(layer, DenseAttention)]
    match new:
        case MoAAttention() if dense:
            yield _fill_moa(new, dense, norm_of_queries)
        case MoHAttention() if dense:
            yield _fill_moh(new, dense, norm_of_queries)
        case SwitchHeadAttention() if dense:
            yield _fill_switchhead(new, dense, norm_of_queries, norm_of_keys)


def _dealt(tensors: Iterable[Tensor], num_experts: int) -> Tensor:
    """Deal matrices [n, ...] of several models to experts in turn: [num_experts, ...]."""
    all_models = torch.cat(list(tensors))
    return all_models.repeat(num_experts // len(all_models), *[1] * (all_models.dim() - 1))


def _fill_moa(new: MoAAttention, old: Sequence[DenseAttention], norm: nn.Module) -> UpcycledPart:
    num_experts = new.router.config.num_experts
    new.q.weight.copy_(_dealt((dense.q.weight.T[None] for dense in old), num_experts))
    outputs = _dealt((dense.o.weight.T[None] for dense in old), num_experts)
    new.o.weight.copy_(outputs / _even_out(new.router, norm))
    exact = _sums_to_one(new.router.config)
    how = "queries and outputs copied into every expert"
    return UpcycledPart("attention", exact, _how(how, len(old), exact))


def _fill_moh(new: MoHAttention, old: Sequence[DenseAttention], norm: nn.Module) -> UpcycledPart:
    router = new.router.config
    projections = ((dense.q, dense.k, dense.v) for dense in old)
    for ours, *theirs in zip((new.q, new.k, new.v), *projections, strict=True):
        weights = _dealt((linear.weight[None] for linear in theirs), router.num_experts)
        ours.weight.copy_(weights.flatten(0, 1))
    outputs = _dealt((dense.o.weight.T[None] for dense in old), router.num_experts)
    new.o.weight.copy_(outputs / (router.top_k * _even_out(new.router, norm)))
    exact = _sums_to_one(router)
    how = "all heads copied into every expert"
    return UpcycledPart("attention", exact, _how(how, len(old), exact))


def _fill_switchhead(
    new: SwitchHeadAttention,
    old: Sequence[DenseAttention],
    norm_of_queries: nn.Module,
    norm_of_keys: nn.Module,
) -> UpcycledPart:
    H = new.config.num_heads
    for experts, matrices_HDd, router, norm in (
        (
            new.v,
            [dense.v.weight.unflatten(0, (H, -1)).mT for dense in old],
            new.value_router,
            norm_of_keys,
        ),
        (
            new.o,
            [dense.o.weight.T.unflatten(0, (H, -1)) for dense in old],
            new.output_router,
            norm_of_queries,
        ),
    ):
        of_heads = _dealt((matrix[None] for matrix in matrices_HDd), router.config.num_experts)
        weights = of_heads.transpose(0, 1) / _even_out(router, norm)[:, None, None, None]
        experts.weight.copy_(weights.flatten(0, 1))
    exact = _sums_to_one(new.config.router)
    how = "each head's values and outputs copied into its experts"
    return UpcycledPart("attention", exact, _how(how, len(old), exact))


def _fill_ffn(
    new: MoEFeedForward, old: Sequence[DenseFeedForward], norm: nn.Module
) -> UpcycledPart:
    router, d_expert = new.router.config, new.config.d_expert
    num_slices = old[0].up.out_features // d_expert
    whole_groups = router.top_k % num_slices == 0
    if whole_groups:
        rows = _logits(new.router)
        rows.copy_(rows[::num_slices].repeat_interleave(num_slices, 0))

    def slices(weights: Iterable[Tensor]) -> Tensor:
        """[d_ff, D] of each model -> [num_experts, d_expert, D]."""
        return _dealt((w.unflatten(0, (num_slices, d_expert)) for w in weights), router.num_experts)

    new.up.weight.copy_(slices(dense.up.weight for dense in old).mT)
    if new.gate is not None:
        gates = (dense.gate.weight for dense in old if dense.gate is not None)
        new.gate.weight.copy_(slices(gates).mT)
    scale = num_slices / _even_out(new.router, norm)
    new.down.weight.copy_(slices(dense.down.weight.T for dense in old) * scale)
    how = "copied into every expert"
    if num_slices > 1:
        num_groups = router.num_experts // num_slices
        how = f"cut into {num_slices} slices, {num_groups} experts of each"
    if not whole_groups:
        how += f", of which a token takes {router.top_k}"
    exact = whole_groups and _sums_to_one(router)
    return UpcycledPart("ffn", exact, _how(how, len(old), exact))


def _how(how: str, num_models: int, exact: bool) -> str:
    turns = "" if num_models == 1 else f", {num_models} models in turn"
    return f"{how}{turns}; {'exact' if exact else 'approximate: compare the losses'}"


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
