"""Counts what the layers of a model compute, without running it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from torch import nn

from moa_dist.models.stack import LayerStack
from moa_dist.moe.borrowing import used_modules


def applications(model: nn.Module) -> Counter[nn.Module]:
    """Count the uses of every module of a model's layers in a forward."""
    return sum((stack.applications() for stack in _stacks(model)), Counter[nn.Module]())


def macs_of(model: nn.Module, length: int, *, training: bool) -> dict[str, Counter[str]]:
    """Count multiply-accumulates of all layers over a sequence of `length`, as `Block.macs` does.

    The choice of how often tokens recur belongs to the rest.
    """
    parts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for stack in _stacks(model):
        first = next((i for i, layer in enumerate(stack.plan) if stack.block(layer).halting), None)
        for i, (layer, num) in enumerate(zip(stack.plan, stack.lengths(length), strict=True)):
            of_block = stack.block(layer).macs(num, i, training=training, is_first=i == first)
            for part, macs in of_block.items():
                parts[part] += macs
        if stack.recursion is not None:
            parts["rest"]["routers"] += stack.recursion.macs(length)
    return parts


def token_uses(model: nn.Module, length: int) -> dict[nn.Module, float]:
    """Count the uses of every module per token, in the mean over a sequence of `length`."""
    uses: dict[nn.Module, float] = defaultdict(float)
    for stack in _stacks(model):
        for layer, num in zip(stack.plan, stack.lengths(length), strict=True):
            for module in used_modules(stack.block(layer)):
                uses[module] += num / length
    return uses


def _stacks(model: nn.Module) -> Iterator[LayerStack]:
    return (module for module in model.modules() if isinstance(module, LayerStack))
