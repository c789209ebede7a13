"""A small copy of a configuration: other sizes, the same choices, so that it costs seconds to run.

Every field that is not a size stays as it is, also one that this file has never heard of.
"""

from __future__ import annotations

from math import ceil
from typing import Any, TypeVar

from moa_dist.config.checks import check_fields
from moa_dist.config.model import (
    ModelConfig,
    RouterConfig,
    Section,
    SwitchHeadConfig,
    sequences_per_group,
)
from moa_dist.config.run import Config

AnySection = TypeVar("AnySection", bound=Section)

_LENGTH = 16
_VOCABULARY, _D_MODEL, _D_FF, _D_HEAD, _D_EXPERT = 64, 24, 32, 8, 8
_LAYERS, _REPEATS, _HEADS, _TOP_K = 2, 2, 2, 3
_MICRO_BATCH, _ACCUMULATION = 4, 2
_ALIGNMENT = 8
"""Widths keep their remainder by it: kernels and rotated widths depend on it."""


def shrink(config: Config, world_size: int) -> Config:
    """The copy that is verified in place of `config`, which must fit `world_size` ranks.

    Sharding meets the same cases: an uneven number of experts stays uneven, a shared layer is
    applied twice, accumulation stays accumulation. Dropout is off, since each layout draws its
    own.
    """
    ep, train = config.parallel.expert_parallel, config.train
    groups = sequences_per_group(config.model)
    micro_batch = groups * min(_MICRO_BATCH, train.micro_batch // groups)
    accumulation = min(train.global_batch // (world_size * train.micro_batch), _ACCUMULATION)
    result = _changed(
        config,
        model=_shrink_model(config.model, ep),
        data=_changed(config.data, sequence_length=min(config.data.sequence_length, _LENGTH)),
        train=_changed(
            train,
            micro_batch=micro_batch,
            global_batch=world_size * micro_batch * accumulation,
        ),
    )
    assert not check_fields(result), check_fields(result)
    return result


def _changed(section: AnySection, **fields: Any) -> AnySection:
    """A validated copy."""
    copy = section.model_copy(update=fields)
    return type(section).model_validate(copy.model_dump())


def _small(size: int, at_least: int, modulus: int = _ALIGNMENT) -> int:
    """The smallest number from `at_least` on that leaves `size`'s remainder; never above `size`."""
    return min(size, at_least + (size - at_least) % modulus)


def _shrink_model(model: ModelConfig, ep: int) -> ModelConfig:
    distinct = model.num_distinct_layers or model.num_layers
    layers = min(distinct, _LAYERS)
    return _changed(
        model,
        vocab_size=_small(model.vocab_size, _VOCABULARY),
        dropout=0.0,
        d_model=_small(model.d_model, _D_MODEL),
        num_layers=layers * min(model.num_layers // distinct, _REPEATS),
        num_distinct_layers=None if model.num_distinct_layers is None else layers,
        attention=_shrink_attention(model.attention, ep),
        ffn=_shrink_ffn(model.ffn, ep),
    )


def _shrink_attention(attention: Any, ep: int) -> Any:
    fraction = 1.0 if attention.rope is None else attention.rope.fraction
    # Rounded down to even, at least one pair of dimensions must remain to be rotated.
    fields = {"d_head": _small(attention.d_head, max(_D_HEAD, ceil(2 / fraction)))}
    if attention.kind == "dense":
        return _changed(attention, **fields, num_heads=min(attention.num_heads, _HEADS))
    heads = attention.num_heads if isinstance(attention, SwitchHeadConfig) else 1
    router = _shrink_router(attention.router, ceil(ep / heads), ep)
    if isinstance(attention, SwitchHeadConfig):
        # Experts are counted over all heads, both numbers keep their remainders by ep.
        fields["num_heads"] = _small(heads, max(_HEADS, ceil(ep / router.num_experts)), ep)
    else:
        fields["heads_per_expert"] = min(attention.heads_per_expert, _HEADS)
    return _changed(attention, **fields, router=router)


def _shrink_ffn(ffn: Any, ep: int) -> Any:
    if ffn.kind == "dense":
        return _changed(ffn, d_ff=_small(ffn.d_ff, _D_FF))
    return _changed(
        ffn,
        d_expert=_small(ffn.d_expert, _D_EXPERT),
        router=_shrink_router(ffn.router, ep, ep),
    )


def _shrink_router(router: RouterConfig, at_least: int, ep: int) -> RouterConfig:
    """With enough experts that some are idle, and that all ranks hold as unequal shares as ever."""
    top_k = min(router.top_k, _TOP_K)
    num_experts = _small(router.num_experts, max(16 * top_k, at_least), ep)
    if router.top_k == router.num_experts:
        top_k = num_experts
    return _changed(router, num_experts=num_experts, top_k=top_k, expert_dropout=0.0)
