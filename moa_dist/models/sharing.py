"""Which block every application of a layer uses, and what blocks share.

Without sharing by part, applications of one layer use one block. Otherwise each has a block, and
all but the first of one layer borrow from the first (`moa_dist.moe.borrowing`) what they share:
whole parts, norms, or what a part consists of. A block's forward is the same in all cases.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.sharing import Own, SharingConfig
from moa_dist.models.block import Block
from moa_dist.models.linear import Linear
from moa_dist.moe.borrowing import borrow
from moa_dist.moe.initialize import Constant, Normal
from moa_dist.moe.router import Router


class Layers(NamedTuple):
    """What a stack consists of."""

    blocks: list[Block]
    """Blocks, in the order in which they are first applied."""
    order: tuple[int, ...]
    """Index of the block of every application."""


class AdaptedLinear(nn.Module):
    """`W x + B (A x)`: W is shared, and A and B, of low rank, belong to one application.

    LoRA (Hu et al. 2021) per repeat, as in relaxed recursive Transformers (Bae et al. 2024). It
    adds nothing at first, as B starts at zero.
    """

    def __init__(self, shared: Linear, rank: int) -> None:
        super().__init__()
        d_in, d_out = shared.in_features, shared.out_features
        rank = min(rank, d_in, d_out)
        self.shared = shared
        self.down = Linear(d_in, rank, Normal(1 / math.sqrt(d_in)))
        self.up = Linear(rank, d_out, Constant(0.0))

    def macs(self, num_rows: int) -> int:
        """Count multiply-accumulates for `num_rows` rows."""
        return sum(layer.macs(num_rows) for layer in (self.shared, self.down, self.up))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        y: Tensor = self.shared(x) + self.up(self.down(x))
        return y


def make_layers(config: ModelConfig, *, cross: bool) -> Layers:
    """Build the blocks of a stack; with `cross` they also attend to an encoder.

    Raises ValueError unless the distinct layers divide those between prelude and coda.
    """
    last = config.model_copy(update={"halting": None})
    first = last.model_copy(update={"ffn": config.prelude_ffn or config.ffn})
    layers = core_layers(config)
    if config.sharing.is_partial:
        core, order = _core_by_part(config, layers, cross=cross), list(range(len(layers)))
    else:
        core, order = [Block(config, cross=cross) for _ in range(max(layers) + 1)], layers
    blocks = [
        *(Block(first, cross=cross) for _ in range(config.prelude)),
        *core,
        *(Block(last, cross=cross) for _ in range(config.coda)),
    ]
    _share_among_routers(blocks)
    start, end = config.prelude, config.prelude + len(core)
    of_core = (start + block for block in order)
    return Layers(blocks, (*range(start), *of_core, *range(end, len(blocks))))


def _share_among_routers(blocks: list[Block]) -> None:
    """Let routers of one name, which differ in their layer, use the same `Router.of_all_layers`."""
    first: dict[tuple[str, str], nn.Module] = {}
    for block in blocks:
        for name, router in block.routers().items():
            for child in router.of_all_layers:
                lent = first.setdefault((name, child), getattr(router, child))
                if lent is not getattr(router, child):
                    borrow(router, child, lent)


def core_layers(config: ModelConfig) -> list[int]:
    """Number the distinct layer of every application between prelude and coda, from 0."""
    num_core = config.num_core_layers
    distinct = config.num_distinct_layers or num_core
    if num_core < 1 or num_core % distinct:
        raise ValueError(f"{distinct} distinct layers do not divide {num_core} layers")
    if config.sharing.order == "cycle":
        return [i % distinct for i in range(num_core)]
    return [i // config.num_repeats for i in range(num_core)]


def _core_by_part(config: ModelConfig, layers: list[int], *, cross: bool) -> list[Block]:
    """Build a block for every application; the first of each layer lends to the others."""
    sharing = config.sharing
    lenders: dict[int, Block] = {}
    blocks = []
    for layer in layers:
        block = Block(config, cross=cross, has_vector=sharing.vectors)
        if layer in lenders:
            _share(block, lenders[layer], sharing)
        else:
            _adapt(block, sharing)
            lenders[layer] = block
        blocks.append(block)
    return blocks


def _adapt(lender: Block, sharing: SharingConfig) -> None:
    """Give the matrices that `lender` shares with others the adapters of its own application."""
    if sharing.adapter_rank is None:
        return
    for holder, name in _shared_children(lender, sharing):
        part = getattr(holder, name)
        for child_name, child in list(part.named_children()):
            if isinstance(child, Linear):
                setattr(part, child_name, AdaptedLinear(child, sharing.adapter_rank))


def _share(block: Block, lender: Block, sharing: SharingConfig) -> None:
    """Let `block` borrow from `lender`, which has its adapters already, all that they share."""
    pairs = zip(_shared_children(block, sharing), _shared_children(lender, sharing), strict=True)
    for (holder, name), (lending_holder, _) in pairs:
        ours, lent = getattr(holder, name), getattr(lending_holder, name)
        own = [child for child in lent.children() if _is_own(child, sharing)]
        if not own:
            borrow(holder, name, lent)
            continue
        for child_name, child in list(lent.named_children()):
            if isinstance(child, AdaptedLinear):
                assert sharing.adapter_rank is not None
                adapted = AdaptedLinear(child.shared, sharing.adapter_rank)
                borrow(adapted, "shared", child.shared)
                setattr(ours, child_name, adapted)
            elif child not in own:
                borrow(ours, child_name, child)


def _is_own(child: nn.Module, sharing: SharingConfig) -> bool:
    """Whether every application has such a child of a shared part for itself."""
    is_router = isinstance(child, Router) and "routers" in sharing.own
    return is_router or isinstance(child, AdaptedLinear)


def _shared_children(block: Block, sharing: SharingConfig) -> list[tuple[nn.Module, str]]:
    """List holder and name of each part and norm of `block` that applications share."""
    children: list[tuple[nn.Module, str, Own]] = [
        (block, "attention_norm", "norms"),
        (block, "attention", "attention"),
        (block, "ffn_norm", "norms"),
        (block, "ffn", "ffn"),
    ]
    if block.cross is not None:
        children += [(block.cross, "norm", "norms"), (block.cross, "attention", "attention")]
    shared = [(holder, name) for holder, name, part in children if part not in sharing.own]
    return shared if block.halting is None else [*shared, (block.halting, "gate")]
