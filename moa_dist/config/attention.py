"""Attention of a model: dense, MoA or SwitchHead; `config/family.py` has kinds of relatives.

A new kind is a subclass of `AttentionConfig`, which knows its routers, its experts and how to
shrink; a module; and a line in `moa_dist.models.kinds`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny

from moa_dist.config.parts import PartConfig
from moa_dist.config.positions import RopeConfig, WindowConfig
from moa_dist.config.routers import RouterConfig, shrunk
from moa_dist.config.section import Kind
from moa_dist.errors import Problem

_SHRUNK_WIDTH, _SHRUNK_HEADS = 8, 2


class AttentionConfig(PartConfig):
    """The family of attention kinds."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    d_head: PositiveInt
    """Width of a head."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""
    window: WindowConfig | None = None
    """How far queries see, in some layers or in all; null for no limit."""
    soft_cap: PositiveFloat | None = None
    """Bound of the logits of the softmax: each becomes `soft_cap * tanh(logit / soft_cap)`. It is
    50 in Gemma 2. No fused kernel of torch has it, so attention is then computed a block of queries
    at a time, and again in the backward pass: slower, with as little memory."""
    qk_norm: bool = False
    """Normalize every head's queries and keys before they are rotated: an RMSNorm each, with
    learned scales that all heads share (Henry et al. 2020; as in Qwen3)."""

    @property
    def is_causal(self) -> bool:
        """Whether a query can see the keys before it only, as such a kind is defined."""
        return False

    def without_positions(self) -> Self:
        """Return a copy that does not know where tokens are, to attend to another text."""
        return self.model_copy(update={"rope": None})

    def shrink(self, expert_parallel: int) -> Self:
        """Narrow heads and window, but leave at least one pair of dimensions to rotate."""
        window = None if self.window is None else self.window.shrink()
        ropes = [self.rope, None if window is None else window.rope]
        fraction = min((rope.fraction for rope in ropes if rope is not None), default=1.0)
        d_head = shrunk(self.d_head, max(_SHRUNK_WIDTH, ceil(2 / fraction)))
        routers = self._shrunk_routers(expert_parallel)
        return self.changed(d_head=d_head, window=window, **routers)


class DenseAttentionConfig(AttentionConfig):
    """Multi-head attention."""

    kind: Literal["dense"] = "dense"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads of queries."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, each for equally many consecutive heads of queries (Ainslie et al.
    2023); null for as many."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def problems(self, path: str) -> Iterable[Problem]:
        """Heads of keys and values must divide those of queries."""
        if self.num_heads % self.kv_heads:
            yield Problem(
                f"`{path}.num_kv_heads` is {self.num_kv_heads}, which does not divide "
                f"`{path}.num_heads` = {self.num_heads}",
                (f"{path}.num_kv_heads", f"{path}.num_heads"),
            )

    def shrink(self, expert_parallel: int) -> Self:
        """Keep a few narrow heads, which share keys and values if they did."""
        heads = min(self.num_heads, _SHRUNK_HEADS)
        kv_heads = 1 if self.kv_heads < self.num_heads else None
        return super().shrink(expert_parallel).changed(num_heads=heads, num_kv_heads=kv_heads)


class MoAConfig(AttentionConfig):
    """Mixture of attention heads (Zhang et al. 2022): experts are query and output projections."""

    kind: Literal["moa"] = "moa"
    """Names this kind."""
    heads_per_expert: PositiveInt = 1
    """Heads in one expert (1 in the paper); keys and values are shared by all experts."""
    attend: Literal["softmax", "stick_breaking"] = "softmax"
    """How queries and keys weigh values: by a softmax, or by breaking a stick from the nearest key
    on, which knows the order of keys by itself and is causal (ModuleFormer)."""
    relative_positions: PositiveInt | None = None
    """Distance up to which each head of an expert learns a vector per distance, and beyond which it
    does not tell them apart: it is added to keys (Shaw et al. 2018; 63 in SUT). Null for none."""
    kv_bias: bool = False
    """Add biases to keys and values."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each query token."""
    shared_experts: NonNegativeInt = 0
    """Experts that every query token uses with weight 1, next to those that it is routed to. They
    share keys and values with these, and every rank holds them."""
    output_bias: bool = False
    """Add a bias to the sum of the experts' outputs, one for all of them (JetMoE)."""

    @property
    def is_causal(self) -> bool:
        """Whether a query can see the keys before it only."""
        return self.attend == "stick_breaking"

    def without_positions(self) -> Self:
        """Return a copy without relative positions either."""
        return super().without_positions().model_copy(update={"relative_positions": None})

    def problems(self, path: str) -> Iterable[Problem]:
        """Stick-breaking attention knows the order of keys by itself."""
        if self.is_causal and self.relative_positions is not None:
            key = f"{path}.relative_positions"
            yield Problem(
                f"`{key}` does not work with `{path}.attend` {self.attend}; remove it",
                (key, f"{path}.attend"),
            )

    def shrink(self, expert_parallel: int) -> Self:
        """Keep a few narrow heads in each of fewer experts."""
        heads = min(self.heads_per_expert, _SHRUNK_HEADS)
        shared = min(self.shared_experts, _SHRUNK_HEADS)
        result = super().shrink(expert_parallel)
        return result.changed(heads_per_expert=heads, shared_experts=shared)


class SwitchHeadConfig(AttentionConfig):
    """SwitchHead (Csordas et al. 2023): dense queries and keys, expert values and outputs."""

    kind: Literal["switchhead"] = "switchhead"
    """Names this kind."""
    num_heads: PositiveInt
    """Heads, each with one attention matrix and its own experts."""
    router: SerializeAsAny[RouterConfig]
    """Used twice: for values on the source token, for outputs on the destination token."""
    shared_experts: bool = False
    """Give every head a value and an output expert that all tokens use with weight 1, next to those
    that they are routed to. Every head is on for all tokens already. Every rank holds them."""

    @property
    def num_flat_experts(self) -> int:
        """Experts of all heads."""
        return self.num_heads * self.router.num_experts

    def shrink(self, expert_parallel: int) -> Self:
        """Keep the remainders by ep of both heads and experts, which are sharded together."""
        router = self.router.shrink(ceil(expert_parallel / self.num_heads), expert_parallel)
        enough = max(_SHRUNK_HEADS, ceil(expert_parallel / router.num_experts))
        heads = shrunk(self.num_heads, enough, expert_parallel)
        return super().shrink(expert_parallel).changed(num_heads=heads, router=router)
