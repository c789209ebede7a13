"""What the parts of a model must move through a GPU's memory, from shapes alone, in bf16.

Every tensor that one kernel leaves to another is written and read once; a kernel reads each operand
once, and rows that it gathers as often as they are gathered. Bytes of both passes together.

Shapes: T tokens, D model width, A assignments of a router, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from moa_dist.models.attention import Attention
from moa_dist.models.block import Block
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.linear import Linear
from moa_dist.models.stack_counts import macs_of
from moa_dist.moe.routed_module import RoutedModule, routed_modules
from moa_dist.moe.router import Router
from moa_dist.plan.cluster import GPUS
from moa_dist.plan.time import Assumptions, row_bytes

NARROW, WIDE, INDEX = 2, 4, 8
"""Bytes of a number of an activation or weight, of one of logits and sums, and of an index."""
GPU = GPUS["h100"]
ASSUMED = Assumptions()


def part_bytes(model: LanguageModel, num_tokens: int) -> Counter[str]:
    """Estimate the bytes of each part for a micro-batch of `num_tokens`."""
    T, D, V = num_tokens, model.config.d_model, model.config.vocab_size
    repeats = model.config.num_repeats
    rows = row_bytes(model, NARROW, num_tokens)
    parts: Counter[str] = Counter()
    parts["embedding"] = NARROW * (3 * T * D + V * D)
    # Logits: written, read by the loss, its gradient written, read by two products.
    parts["head and loss"] = NARROW * (6 * T * V + 3 * T * D + 3 * V * D)
    parts["norms"] = NARROW * 5 * T * D
    parts["experts, forward"] = round(T * sum(rows.forward.values()))
    parts["experts, backward"] = round(T * rows.backward)
    for block in model.stack.blocks():
        for name, moved in _of_block(block, T, D, repeats).items():
            parts[name] += repeats * moved
    return parts


def _of_block(block: Block, T: int, D: int, repeats: int) -> Counter[str]:
    """Estimate one application of a block, but for the rows of its experts."""
    parts: Counter[str] = Counter()
    norms = [m for m in block.children() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    parts["norms"] = NARROW * 5 * T * D * len(norms)
    # Each sublayer adds to the stream, and the gradients of all that read the stream are added up.
    num_readers = 3 if block.placement == "peri" else 2
    parts["residual"] = NARROW * T * D * 2 * (3 + 3 * (num_readers - 1))
    for part in (block.attention, block.ffn):
        parts += _of_maps(part, T, D, repeats)
        if isinstance(part, RoutedModule):
            parts += _of_experts(part, repeats)
        parts += _of_routers(part, T, D)
    parts["attention core"] = NARROW * T * _core_width(block.attention)
    if not isinstance(block.ffn, RoutedModule):  # activations between dense maps
        hidden = block.ffn.get_submodule("up").out_features
        parts["dense maps"] += NARROW * T * hidden * (5 if block.ffn.gate is None else 11)
    return parts


def _gradient_bytes(repeats: int) -> float:
    """Return the bytes per weight and use of a gradient, summed over repeats in fp32."""
    if repeats == 1:
        return NARROW
    return (WIDE + (repeats - 2) * 2 * WIDE + WIDE + NARROW) / repeats


def _of_maps(part: nn.Module, T: int, D: int, repeats: int) -> Counter[str]:
    """Estimate dense maps: those that read the input of `part` read it together."""
    maps = [m for m in part.children() if isinstance(m, Linear)]
    moved = 0.0
    for of_input in (True, False):
        group = [m for m in maps if (m.in_features == D) == of_input]
        if group:
            # Rows are read by two products, and their gradient is written.
            moved += NARROW * T * 3 * group[0].in_features
            moved += NARROW * T * sum(3 * m.out_features for m in group)
            weights = sum(m.weight.numel() for m in group)
            moved += weights * (2 * NARROW + _gradient_bytes(repeats))
    return Counter({"dense maps": round(moved)} if maps else {})


def _of_experts(part: RoutedModule, repeats: int) -> Counter[str]:
    """Estimate the matrices of experts, which forward and backward read, and their gradients."""
    weights = [layer.weight.numel() for layer in part.expert_layers().values()]
    moved = sum(weights) * (2 * NARROW + _gradient_bytes(repeats))
    return Counter({"experts, matrices": round(moved)})


def _of_routers(part: nn.Module, T: int, D: int) -> Counter[str]:
    parts: Counter[str] = Counter()
    for router in part.children():
        if isinstance(router, Router):
            A = T * router.num_groups * router.config.top_k
            # Rows, read by two products; the gradient of the rows; logits, written and read in
            # both passes, and their gradient, written in fp32 and narrowed for two products.
            logits = T * router.num_experts * (5 * WIDE + 3 * NARROW)
            parts["routers"] += NARROW * 3 * T * D + logits + A * 2 * (INDEX + WIDE)
            # Choices sorted: read, then order, place and token of each, and the permuted weight.
            parts["dispatch"] += A * (7 * INDEX + 4 * WIDE)
    return parts


def _core_width(attention: Attention) -> int:
    """Return the numbers per token of queries, keys, values and results in both passes."""
    config = attention.config
    own = config.num_heads if hasattr(config, "num_heads") else config.heads_per_expert
    heads = own * (config.router.top_k if hasattr(config, "heads_per_expert") else 1)
    shared = getattr(config, "num_kv_heads", None) or own
    q, kv = heads * config.d_head, shared * config.d_head
    rotated = 0 if config.rope is None else 4 * (q + kv)
    # Forward reads three and writes one; backward reads those and a gradient, and writes three.
    return rotated + 5 * q + 6 * kv


def of_experts(moved: Counter[str]) -> int:
    """Select what experts move, from bytes by part or by file of a record."""
    return sum(n for name, n in moved.items() if name.startswith(("experts", "kernels/triton")))


class Floor(NamedTuple):
    """Seconds that the experts of one routed layer take."""

    flops: float
    """Its products, at the peak."""
    bytes: float
    """Its bytes, at the full bandwidth."""

    def expected(self, moved: float) -> float:
        """Return the slower of both at the efficiencies that `moa-dist plan` assumes.

        Kernels move `moved` times as many bytes as they must.
        """
        products = self.flops / ASSUMED.matmul_efficiency
        return max(products, moved * self.bytes / ASSUMED.memory_efficiency)


def floor_of(model: LanguageModel, num_tokens: int) -> Floor:
    """Estimate the average routed part of a layer, both passes, on one H100."""
    moved = of_experts(part_bytes(model, num_tokens))
    work = macs_of(model, 1, training=True).values()
    macs = 3 * num_tokens * sum(part["experts"] for part in work)
    peak = GPU.flops("bf16")
    assert peak is not None
    num_layers = model.config.num_repeats * len(list(routed_modules(model)))
    return Floor(2 * macs / peak / num_layers, moved / GPU.memory_bandwidth / num_layers)
