"""Gradients of tensors that a forward pass uses several times, such as weights of shared layers.

Autograd would round the gradient of every use to the tensor's type and add the rounded ones in that
type. Here uses add to one sum in fp32 or wider instead, within the product that computes their term
where this is possible, and what leaves the backward pass is rounded once.

A sum exists from the first use that the backward pass reaches to the last. In the autograd graph
it is a node between the tensor and its uses: these return no gradient, but the node runs after
all of them, and returns the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Into(NamedTuple):
    """Where the gradient of a tensor goes."""

    out: Tensor
    """Receives the result."""
    total: Tensor | None = None
    """What is added to the gradient before it is rounded; may be `out` itself."""


def is_widened(x: Tensor) -> bool:
    """Whether a product of rows like x is unrounded only if these are widened: not on GPUs."""
    return x.device.type == "cpu" or x.dtype not in (torch.bfloat16, torch.float16)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute `left @ right` in fp32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if is_widened(left):
        return torch.mm(left.to(wide), right.to(wide))
    return torch.mm(left, right, out_dtype=wide)


class GradientSum:
    """The sum of the gradients of one tensor over its uses in one forward pass."""

    def __init__(self, tensor: Tensor, num_uses: int) -> None:
        self._dtype = tensor.dtype
        self._wide = torch.promote_types(tensor.dtype, torch.float32)
        self._num_uses = num_uses
        self._num_added = 0
        self._total: Tensor | None = None

    def into(self, like: Tensor) -> Into:
        """Begin a use whose gradient has the shape of `like`; `out` must then be filled.

        It is the sum so far, which thereby becomes the sum with this use. The result of the last
        use is rounded.
        """
        self._num_added += 1
        total = self._total
        dtype = self._dtype if self._num_added == self._num_uses else self._wide
        if total is None or total.dtype != dtype:
            self._total = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        assert self._total is not None
        return Into(self._total, total)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of a use."""
        self._num_added += 1
        if self._total is None:
            self._total = gradient.to(self._wide, copy=True)
        else:
            self._total += gradient

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left @ right`, the gradient of a use, unrounded."""
        self._num_added += 1
        if self._total is None:
            self._total = wide_product(left, right)
            return
        total, wide = self._total, self._wide
        if is_widened(left):
            total.addmm_(left.to(wide), right.to(wide))
        else:
            torch.addmm(total, left, right, out_dtype=wide, out=total)

    def take(self) -> Tensor | None:
        """Return the sum, rounded to the type of the tensor, and begin anew; None if it is zero."""
        total, self._total, self._num_added = self._total, None, 0
        return None if total is None else total.to(self._dtype)


class _Return(torch.autograd.Function):
    """Returns the sum of a tensor's gradients, after all uses of the handle have added theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, total: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        return tensor.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, None]:
        return ctx.total.take(), None


_ATTRIBUTE = "summed_gradient"

Operands = tuple[Tensor, GradientSum]
"""What a differentiable operation takes besides a tensor whose gradients are summed: the handle,
which connects it to the node that returns the sum, and the sum, to which its backward adds."""


class _Summed:
    """A tensor and the sum of its gradients."""

    def __init__(self, tensor: Tensor, num_uses: int) -> None:
        self.tensor = tensor
        self._sum = GradientSum(tensor, num_uses)
        self._handle: Tensor | None = None

    def operands(self) -> Operands:
        """Return operands of a use; the first one must have the tensor whole, under ZeRO 3 too."""
        if self._handle is None:
            self._handle = _Return.apply(self.tensor, self._sum)
        return self._handle, self._sum


class GradientSums:
    """The sums of one forward pass: of every parameter that has several uses in it."""

    def __init__(self, num_uses: Mapping[Tensor, int]) -> None:
        self._num_uses = num_uses if torch.is_grad_enabled() else {}
        self._summed: dict[Tensor, _Summed] = {}

    def of(self, weights: Mapping[Tensor, Tensor]) -> Repeats:
        """Return those of some parameters, given what is used in place of each, perhaps itself.

        Layers that share a parameter get the same sum.
        """
        for parameter, used in weights.items():
            num_uses = self._num_uses.get(parameter, 1)
            if num_uses > 1 and used.requires_grad and parameter not in self._summed:
                self._summed[parameter] = _Summed(used, num_uses)
        return Repeats({p: self._summed[p] for p in weights if p in self._summed})


class Repeats:
    """The uses that a layer makes of some parameters, and the sums of their gradients."""

    def __init__(self, summed: dict[Tensor, _Summed]) -> None:
        self._summed = summed

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Let operations of this file, and routed experts, add to the sums while open.

        May be open already.
        """
        closed = [parameter for parameter in self._summed if not hasattr(parameter, _ATTRIBUTE)]
        for parameter in closed:
            setattr(parameter, _ATTRIBUTE, self._summed[parameter])
        try:
            yield
        finally:
            for parameter in closed:
                delattr(parameter, _ATTRIBUTE)

    def detached(self, used: Tensor) -> Tensor:
        """Return what is used in place of a parameter without its own edges in the graph.

        Nothing then makes zeros of the gradients that its uses do not return.
        """
        is_summed = any(used is summed.tensor for summed in self._summed.values())
        return used.detach() if is_summed else used

    def aliases(self) -> dict[Tensor, Tensor]:
        """Return what other code, such as a compiled graph, shall use instead of each tensor.

        The gradient of a use is then rounded before it is added.
        """
        return {
            summed.tensor: _Alias.apply(summed.tensor, *summed.operands())
            for summed in self._summed.values()
        }


def _summed(tensor: Tensor) -> _Summed | None:
    if torch.compiler.is_compiling():
        return None
    found: _Summed | None = getattr(tensor, _ATTRIBUTE, None)
    return found


def used_for(parameter: Tensor, used: Tensor) -> Tensor:
    """Return `used`, which stands for a parameter in all its uses, with the parameter's sum."""
    summed = _summed(parameter)
    if summed is not None:
        setattr(used, _ATTRIBUTE, summed)
    return used


def sum_of(tensor: Tensor) -> Operands | tuple[None, None]:
    """Return the operands that a use of `tensor` takes; None, None if there is no sum."""
    summed = _summed(tensor)
    return (None, None) if summed is None else summed.operands()


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, handle: Tensor, total: GradientSum) -> Tensor:
        ctx.total = total
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.total.add(grads[0])
        return None, None, None


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor for one use, whose gradient is rounded before it is added.

    For operations that cannot add to a sum. An alias keeps the memory that ZeRO 3 would free.
    """
    summed = _summed(tensor)
    return tensor if summed is None else _Alias.apply(tensor, *summed.operands())
