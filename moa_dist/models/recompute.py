"""Activation checkpointing of a block, or its parts, that keeps choices of experts and halting.

Choices must not change between the two passes, nor which assignments are dropped, and kernels
need not repeat a sum bit for bit. So what the routers chose in the first pass is given to them in
the second, and likewise which tokens halted. torch's selective checkpointing could keep choices
too, but it demands that both passes run the very same operations: under ZeRO 3 they do not, as the
gathers of parameters, which run inside the block, depend on what was gathered before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.utils.checkpoint import checkpoint

from moa_dist.kernels.gradient_sum import Repeats
from moa_dist.models.halting import Halting, HaltingState
from moa_dist.moe.borrowing import used_modules
from moa_dist.moe.router import Router, Routing


class Recomputation(NamedTuple):
    """Which parts of a block the backward pass computes again."""

    parts: frozenset[str]
    """Names of the parts."""
    repeats: Repeats
    """Sums of gradients of the block's weights."""

    def call(self, part: str, module: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
        """Call `run(*args)`, which uses the routers of `module`."""
        if part not in self.parts:
            return run(*args)
        return recomputed(module, self.repeats, run, *args)


def recomputed(module: nn.Module, repeats: Repeats, call: Callable[..., Any], *args: Any) -> Any:
    """Call `call(*args)`, but recompute its activations in the backward pass.

    It may use the routers of `module`; gradients of weights go to the sums of `repeats`.
    """
    choosing = [m for m in used_modules(module) if isinstance(m, Router | Halting)]
    choices: list[Any] = []
    passes = 0

    def run(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        hooks = _keeping(choosing, choices) if passes == 1 else _repeating(choosing, choices)
        with hooks, repeats.summing():
            return call(*args)

    # Non-reentrant: with shared layers the other kind fires gradient hooks per repeat.
    return checkpoint(run, *args, use_reentrant=False)


@contextmanager
def _keeping(choosing: Sequence[nn.Module], choices: list[Any]) -> Iterator[None]:
    """Append what modules choose meanwhile to `choices`, in the order in which they are called."""

    def keep(module: nn.Module, inputs: Any, output: Routing | HaltingState) -> None:
        choices.append(output.choice())

    with ExitStack() as hooks:
        for module in choosing:
            hooks.enter_context(module.register_forward_hook(keep))
        yield


@contextmanager
def _repeating(choosing: Sequence[nn.Module], choices: list[Any]) -> Iterator[None]:
    """Give modules their `choices`, in the order in which they were made."""
    remaining = iter(choices)

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "choice": next(remaining)}

    with ExitStack() as hooks:
        for module in choosing:
            hooks.enter_context(module.register_forward_pre_hook(give, with_kwargs=True))
        yield
