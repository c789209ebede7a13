"""One Transformer layer: attention and feed-forward part, with norms placed as configured.

Shapes: B sequences of S tokens, D model width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.kernels.shared_input import share
from moa_dist.models.attention import Attention, AttentionOutput
from moa_dist.models.cache import KeyValues
from moa_dist.models.feed_forward import FeedForwardOutput
from moa_dist.models.halting import left, make_halting
from moa_dist.models.kinds import make_attention, make_feed_forward
from moa_dist.models.linear import Bias
from moa_dist.models.mask import AttentionMask
from moa_dist.models.norms import LayerNorm, RMSNorm
from moa_dist.models.padding import Runs
from moa_dist.models.recompute import Recomputation
from moa_dist.models.state import EMPTY_STATE, LayerState
from moa_dist.models.trace import AttentionTrace, BlockTrace
from moa_dist.moe.borrowing import used_modules
from moa_dist.moe.gathering import ExpertGathering
from moa_dist.moe.routed_module import NOTHING_GATHERED, Gathered, RoutedModule
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.moe.token_state import NO_STATE, TokenState

Value = TypeVar("Value")

NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
}
"""Norm modules by `ModelConfig.norm`."""


def make_norm(config: ModelConfig, eps: float) -> LayerNorm | RMSNorm:
    """Build a norm over the model's width."""
    # Torch's RMSNorm would else take the precision of its input's type: 0.008 for bfloat16.
    return NORMS[config.norm](config.d_model, eps=eps)


class GatheredExperts(NamedTuple):
    """Weights of all experts of one layer, gathered on this rank; empty where tokens are sent."""

    attention: Gathered = NOTHING_GATHERED
    """Experts of self-attention."""
    cross: Gathered = NOTHING_GATHERED
    """Experts of a decoder's attention to the source."""
    ffn: Gathered = NOTHING_GATHERED
    """Experts of the feed-forward part."""

    def map(self, function: Callable[[Tensor], Tensor]) -> GatheredExperts:
        """Apply a function to all weights."""
        return GatheredExperts(*({n: function(w) for n, w in part.items()} for part in self))


_NO_GATHERED_EXPERTS = GatheredExperts()


class BlockOutput(NamedTuple):
    """Result of one layer."""

    x: Tensor
    """[B, S, D]."""
    statistics: dict[str, RoutingStatistics]
    """By router, such as `attention.query`, `attention.value` or `ffn`; routers of a decoder's
    attention to the source are called `attention.cross.query` and so on."""
    cache: KeyValues | None = None
    """The cache extended by the new keys and values; None if the layer was given none."""
    trace: BlockTrace | None = None
    """What the layer decided; None unless a trace was requested."""
    state: LayerState = EMPTY_STATE
    """What the next layer takes next to x."""


class EncoderMemory(NamedTuple):
    """What a decoder's layers see of the source text."""

    x: Tensor
    """[B, R, D], normalized: the encoder's output. R is 0 if a cache holds the source's keys and
    values."""
    query_mask: Tensor | None
    """[B, S] bool, true for real tokens of the target; None when there is no padding."""
    source_mask: Tensor | None
    """[B, source length] bool, true for real tokens; None when there is no padding."""
    runs: Runs | None = None
    """What `source_mask` says, for flash attention; None where that does not run."""

    @property
    def mask(self) -> AttentionMask:
        """Let every token of the target see the whole source."""
        num_past = 0 if self.source_mask is None else self.source_mask.shape[1] - self.x.shape[1]
        return AttentionMask(False, self.query_mask, self.source_mask, num_past, runs=self.runs)


class CrossAttention(nn.Module):
    """A decoder layer's attention to the encoder's output, added to the residual stream.

    It is of the same kind as self-attention, but without rotary positions, as positions in two
    texts cannot be compared.
    """

    def __init__(self, config: ModelConfig, init_scale: float) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.norm = make_norm(config, config.norm_eps)
        without_positions = config.attention.without_positions()
        self.attention = make_attention(without_positions, config.d_model, init_scale)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: EncoderMemory,
        gathered: Gathered,
        cache: KeyValues | None,
        trace: bool = False,
        state: TokenState = NO_STATE,
    ) -> AttentionOutput:
        """x [B, S, D] -> y [B, S, D], the residual stream with the attention's output added."""
        queries = x if self.placement == "post" else self.norm(x)
        output = self.attention(
            queries, memory.x, memory.x, memory.mask, gathered, cache, trace, state
        )
        x = x + self.dropout(output.y)
        return output._replace(y=self.norm(x) if self.placement == "post" else x)


class Block(nn.Module):
    """Self-attention, then feed-forward, each added to the residual stream.

    In a decoder that translates, attention to the source comes between them.
    """

    def __init__(
        self, config: ModelConfig, *, cross: bool = False, has_vector: bool = False
    ) -> None:
        """Build a layer; with `has_vector` it adds a learned vector to its input."""
        super().__init__()
        self.vector = Bias(config.d_model) if has_vector else None
        self.halting = (
            None if config.halting is None else make_halting(config.halting, config.d_model)
        )
        self.placement = config.norm_placement
        self.window = config.attention.window
        self.is_causal = config.objective == "causal" or cross
        init_scale = math.sqrt(2 / config.num_layers)
        self.attention_norm = make_norm(config, config.norm_eps)
        self.attention = make_attention(config.attention, config.d_model, init_scale)
        self.cross = CrossAttention(config, init_scale) if cross else None
        # A dense FFN under peri-norm reads the raw residual and has no router to normalize for.
        unused = config.norm_placement == "peri" and not config.ffn.routers
        self.ffn_norm = nn.Identity() if unused else make_norm(config, config.norm_eps)
        self.ffn = make_feed_forward(config.ffn, config.d_model, init_scale)
        self.dropout = nn.Dropout(config.dropout)

    def routers(self) -> dict[str, Router]:
        """All routers, by the names under which their statistics are returned."""
        routers = _within("ffn", self.ffn.routers())
        for name, attention in reversed(self.attentions().items()):
            routers = _within(name, attention.routers()) | routers
        return routers

    def attentions(self) -> dict[str, Attention]:
        """Self-attention, and a decoder's attention to the source, by their names in a trace."""
        own = {"attention": self.attention}
        return own if self.cross is None else own | {"attention.cross": self.cross.attention}

    def macs(
        self, length: int, application: int, *, training: bool, is_first: bool = False
    ) -> dict[str, Counter[str]]:
        """Count multiply-accumulates of an application to a sequence of `length`.

        They are those of attention, of the FFN and of the rest, each by what does them.
        Applications are counted from 0 in a stack; nothing halts before the first that has halting,
        which `is_first`. The source that a decoder's layer attends to has the same length.
        """
        window = None if self.window is None else self.window.size_in(application)
        if window is not None and not self.is_causal:
            window = 2 * window - 1
        num_keys = length if window is None else min(window, length)
        attention = Counter(self.attention.macs(length, num_keys, training=training))
        if self.cross is not None:
            attention += Counter(self.cross.attention.macs(length, training=training))
        rest = Counter[str]()
        if self.halting is not None and not is_first:
            rest["halting"] = self.halting.macs(length)
        ffn = Counter(self.ffn.macs(length, training=training))
        return {"attention": attention, "ffn": ffn, "rest": rest}

    def start_gathering(self, gathering: ExpertGathering) -> None:
        """Start to gather expert weights: once per forward, for all that use them."""
        for part in self._parts():
            gathering.start(part)

    def gathered(self, gathering: ExpertGathering) -> GatheredExperts:
        """Wait for the expert weights of this layer."""
        return GatheredExperts(*map(gathering.wait, self._parts()))

    def _parts(self) -> tuple[nn.Module | None, ...]:
        """Return what may have experts, in the order of `GatheredExperts`."""
        cross = None if self.cross is None else self.cross.attention
        return self.attention, cross, self.ffn

    def weights(self, gathered: GatheredExperts) -> dict[Tensor, Tensor]:
        """Return what is used in place of each parameter: gathered weights, or itself."""
        used: dict[Tensor, Tensor] = {
            parameter: parameter
            for module in used_modules(self)
            for parameter in module.parameters(recurse=False)
        }
        for part, weights in zip(self._parts(), gathered, strict=True):
            if isinstance(part, RoutedModule):
                layers = part.expert_layers()
                used |= {layers[name].weight: weight for name, weight in weights.items()}
        return used

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        gathered: GatheredExperts = _NO_GATHERED_EXPERTS,
        cache: KeyValues | None = None,
        memory: EncoderMemory | None = None,
        trace: bool = False,
        state: LayerState = EMPTY_STATE,
        again: Recomputation | None = None,
    ) -> BlockOutput:
        """x [B, S, D] -> x [B, S, D]; a decoder that translates needs a `memory`.

        With halting, x is what others see of tokens, and the residual stream is within the state.
        `again` says which parts the backward pass computes again.
        """
        call = _call if again is None else again.call
        own, of_source = (None, None) if cache is None else (cache[:2], cache[2:])
        seen, halting, weight = x, None, None
        if self.halting is not None:
            halting = self.halting(seen, mask.query_mask, state.halting)
            x, weight = halting.inner, halting.weight
            mask = mask._replace(query_mask=halting.running)
        known = state.of_routers("attention", weight)
        attend = (self._attend, x, seen, mask, gathered.attention, own, trace, known)
        x, attention = call("attention", self.attention, *attend)
        named = _within("attention", attention.statistics)
        states = _within("attention", attention.states)
        longer, traces = attention.cache, {"attention": attention.trace}
        if self.cross is not None:
            assert memory is not None
            if halting is not None:
                memory = memory._replace(query_mask=halting.running)
            known = state.of_routers("attention.cross", weight)
            attend_to = (self.cross, x, memory, gathered.cross, of_source, trace, known)
            cross = call("attention", self.cross, *attend_to)
            x = cross.y
            named |= _within("attention.cross", cross.statistics)
            states |= _within("attention.cross", cross.states)
            traces["attention.cross"] = cross.trace
            longer = None if longer is None else (*longer, *cross.cache)
        known = state.of_routers("ffn", weight)
        transform = (self._transform, x, mask.query_mask, gathered.ffn, trace, known)
        x, ffn = call("ffn", self.ffn, *transform)
        named |= _within("ffn", ffn.statistics)
        state = state.with_routers(states | _within("ffn", ffn.states))
        if halting is not None:
            x, halting = left(seen, x, halting)
            state = state._replace(halting=halting)
        decided = _block_trace(traces, ffn) if trace else None
        if decided is not None and halting is not None:
            decided = self._without_halted(decided, halting.running)
        return BlockOutput(x, named, longer, decided, state)

    def _attend(
        self,
        x: Tensor,
        seen: Tensor,
        mask: AttentionMask,
        gathered: Gathered,
        cache: KeyValues | None,
        trace: bool,
        state: TokenState,
    ) -> tuple[Tensor, AttentionOutput]:
        """Let x attend to what is `seen` of all tokens, which is x itself without halting."""
        is_same, is_post = seen is x, self.placement == "post"
        if self.vector is not None:
            x = self.vector(x)
            seen = x if is_same else self.vector(seen)
        n = x if is_post else self.attention_norm(x)
        n = key = share(n, self.attention.parameters())
        if not is_same:
            key = share(seen if is_post else self.attention_norm(seen), self.attention.parameters())
        # Peri, MoEUT section 2.3: norms feed a softmax or a sigmoid, nothing else.
        value = seen if self.placement == "peri" else key
        output = self.attention(n, key, value, mask, gathered, cache, trace, state)
        x = x + self.dropout(output.y)
        return self.attention_norm(x) if is_post else x, output

    def _transform(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        gathered: Gathered,
        trace: bool,
        state: TokenState,
    ) -> tuple[Tensor, FeedForwardOutput]:
        n = x if self.placement == "post" else self.ffn_norm(x)
        n = share(n, self.ffn.parameters())
        raw = x if self.placement == "peri" else n
        output = self.ffn(raw, n, token_mask, gathered, trace, state)
        x = x + self.dropout(output.y)
        return self.ffn_norm(x) if self.placement == "post" else x, output

    def _without_halted(self, trace: BlockTrace, running: Tensor) -> BlockTrace:
        """Leave out what tokens that have halted would have chosen as queries."""
        of_keys = {
            f"{name}.{router}"
            for name, attention in self.attentions().items()
            for router in attention.key_routers
        }
        routing = {
            name: value if name in of_keys else _of_running(value, running)
            for name, value in trace.routing.items()
        }
        return trace._replace(routing=routing, running=running)


def _call(_part: str, _module: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
    return run(*args)


def _block_trace(attention: dict[str, AttentionTrace | None], ffn: FeedForwardOutput) -> BlockTrace:
    """Join the traces of a layer's parts."""
    routing: dict[str, Routing] = _within("ffn", ffn.routing)
    heads = {}
    for part, trace in attention.items():
        assert trace is not None
        routing |= _within(part, trace.routing)
        heads[part] = trace.heads
    return BlockTrace(routing, heads)


def _of_running(routing: Routing, running: Tensor) -> Routing:
    """Leave out what tokens that have halted would have chosen; `running` [B, S] bool."""
    kept = running.flatten()[:, None, None].expand_as(routing.topk_ids)
    return routing._replace(assigned=kept if routing.assigned is None else kept & routing.assigned)


def _within(part: str, by_router: Mapping[str, Value]) -> dict[str, Value]:
    """Prefix names of routers by their part; a router without a name is called like its part."""
    return {f"{part}.{name}".rstrip("."): value for name, value in by_router.items()}
