"""Activation checkpointing of a block that keeps its choices of experts.

Choices must not change between the two passes, nor which assignments are dropped, and kernels
need not repeat a sum bit for bit. So what the routers chose in the first pass is given to them in
the second. torch's selective checkpointing could keep choices too, but it demands that both passes
run the very same operations: under ZeRO 3 they do not, as the gathers of parameters, which run
inside the block, depend on what was gathered before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from moa_dist.kernels.gradient_sum import Repeats
from moa_dist.moe.borrowing import used_modules
from moa_dist.moe.router import Choice, Router, Routing


def recomputed(block: nn.Module, repeats: Repeats, *args: Any) -> Any:
    """Call `block(*args)`, but recompute its activations in the backward pass.

    Gradients of weights go to the sums of `repeats`.
    """
    routers = [module for module in used_modules(block) if isinstance(module, Router)]
    choices: list[Choice] = []
    passes = 0

    def run(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        hooks = _keeping(routers, choices) if passes == 1 else _repeating(routers, choices)
        with hooks, repeats.summing():
            return block(*args)

    # Non-reentrant: with shared layers the other kind fires gradient hooks per repeat.
    return checkpoint(run, *args, use_reentrant=False)


@contextmanager
def _keeping(routers: list[Router], choices: list[Choice]) -> Iterator[None]:
    """Append what routers choose meanwhile to `choices`, in the order in which they are called."""

    def keep(router: Router, inputs: Any, routing: Routing) -> None:
        choices.append(Choice.of(routing))

    with ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(router.register_forward_hook(keep))
        yield


@contextmanager
def _repeating(routers: list[Router], choices: list[Choice]) -> Iterator[None]:
    """Give routers their `choices`, in the order in which they were made."""
    remaining = iter(choices)

    def give(router: Router, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "choice": next(remaining)}

    with ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(router.register_forward_pre_hook(give, with_kwargs=True))
        yield
