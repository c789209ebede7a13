"""A router's choice and statistics as one differentiable operator, for GPUs.

It computes what `Router` computes step by step elsewhere, in two kernels forward and one backward;
what it keeps for the backward pass is the logits and the choices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.hardware import Hardware

LEAST_SUM = 1e-30
"""Smallest sum of chosen scores to divide by. All of them may underflow where better experts are
hidden by dropout: weights are then zero instead of 0 / 0, and in fp32 gradients stay finite."""

MAX_EXPERTS = 8192
"""Experts per router group that one program can hold."""


class Options(NamedTuple):
    """How a router chooses, apart from tensors."""

    top_k: int
    """K."""
    num_groups: int
    """G."""
    num_sequence_groups: int
    """N."""
    score: str
    """As in `RouterConfig.score`."""
    gate: str
    """As in `RouterConfig.gate`."""
    dropout: float
    """Share of experts that are hidden from each token."""


class Chosen(NamedTuple):
    """Choices, and the sums of `RoutingStatistics`."""

    ids: Tensor
    """[T, G, K] int64, `group * E + expert`."""
    weights: Tensor
    """[T, G, K] fp32."""
    log_sum: Tensor
    """[T, G] fp32, logsumexp of the logits."""
    probability: Tensor
    """[N, G, E] fp32, the fields of `RoutingStatistics` from here on."""
    z: Tensor
    """[N, G] fp32."""
    entropy: Tensor
    """[N, G] fp32."""
    load: Tensor
    """[N, G, E] int64."""
    num_tokens: Tensor
    """[N] int64."""
    dropped: Tensor
    """[N, G, E] int64, zero."""


class StatisticsGradients(NamedTuple):
    """Gradients of the statistics; None for those that no loss uses."""

    probability: Tensor | None
    """[N, G, E]."""
    z: Tensor | None
    """[N, G]."""
    entropy: Tensor | None
    """[N, G]."""


def can_fuse(logits: Tensor, num_experts: int) -> bool:
    """Whether `choose` runs on this device, for this type and number of experts per group."""
    on_gpu = Hardware.of(logits.device).runs_triton
    return on_gpu and logits.dtype == torch.float32 and num_experts <= MAX_EXPERTS


def alloc_chosen(logits: Tensor, options: Options) -> Chosen:
    """Allocate, without initializing it, the result of `choose`."""
    K, G, N = options.top_k, options.num_groups, options.num_sequence_groups
    T, E = logits.shape[0], logits.shape[1] // G
    return Chosen(
        ids=logits.new_empty(T, G, K, dtype=torch.int64),
        weights=logits.new_empty(T, G, K),
        log_sum=logits.new_empty(T, G),
        probability=logits.new_empty(N, G, E),
        z=logits.new_empty(N, G),
        entropy=logits.new_empty(N, G),
        load=logits.new_empty(N, G, E, dtype=torch.int64),
        num_tokens=logits.new_empty(N, dtype=torch.int64),
        dropped=logits.new_empty(N, G, E, dtype=torch.int64),
    )


def choose(
    logits: Tensor,
    bias: Tensor | None,
    uniform: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    options: Options,
) -> Chosen:
    """Choose, weight and count by logits [T, G * E] fp32.

    `bias` [G, E] fp32 is added to the scores that choose. `uniform` [T, G, E] fp32 hides an expert
    where it is below `options.dropout`. `token_mask` [T] bool leaves padding out of statistics.
    `given` [T, G, K] int64 are ids chosen before, which are not chosen again.
    """
    return Chosen(*_choose(logits, bias, uniform, token_mask, given, *options))


def _run(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from moa_dist.moe import router_kernels

    bias, uniform, token_mask, given, *options = rest
    return router_kernels.choose(logits, bias, uniform, token_mask, given, Options(*options))


def _run_backward(
    grads: list[Tensor | None],
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    log_sum: Tensor,
    token_mask: Tensor | None,
    *options: Any,
) -> Tensor:
    from moa_dist.moe.router_gradient_kernel import choose_backward

    of_weights, *of_statistics = grads
    return choose_backward(
        of_weights,
        StatisticsGradients(*of_statistics),
        logits,
        ids,
        weights,
        log_sum,
        token_mask,
        Options(*options),
    )


_OPTIONS = "int top_k, int num_groups, int num_sequence_groups, str score, str gate, float dropout"

_choose = torch.library.custom_op(
    "moa_dist::choose",
    _run,
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor logits, Tensor? bias, Tensor? uniform, Tensor? token_mask, Tensor? given, "
        f"{_OPTIONS}) -> ({', '.join(['Tensor'] * len(Chosen._fields))})"
    ),
)
_choose.register_fake(lambda logits, *rest: tuple(alloc_chosen(logits, Options(*rest[4:]))))

_choose_backward = torch.library.custom_op(
    "moa_dist::choose_backward",
    _run_backward,
    mutates_args=(),
    device_types="cuda",
    schema=(
        "(Tensor?[] grads, Tensor logits, Tensor ids, Tensor weights, Tensor log_sum, "
        f"Tensor? token_mask, {_OPTIONS}) -> Tensor"
    ),
)
_choose_backward.register_fake(lambda grads, logits, *rest: torch.empty_like(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, token_mask, _, *options = inputs
    chosen = Chosen(*output)
    ctx.set_materialize_grads(False)  # a gradient that no loss has need not be read
    ctx.mark_non_differentiable(chosen.ids, chosen.log_sum, *chosen[-3:])
    ctx.save_for_backward(logits, chosen.ids, chosen.weights, chosen.log_sum, token_mask)
    ctx.options = options


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    of = dict(zip(Chosen._fields, grads, strict=True))
    used = [of[name] for name in ("weights", "probability", "z", "entropy")]
    grad_logits = _choose_backward(used, *ctx.saved_tensors, *ctx.options)
    return grad_logits, None, None, None, None, *[None] * len(ctx.options)


_choose.register_autograd(_differentiate, setup_context=_save)
