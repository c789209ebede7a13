"""The map of tokens to the logits of a router or a gate, in fp32 or wider.

Shapes: D width of the input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moa_dist.kernels.gradient_sum import GradientSum, sum_of
from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.shared_input import Term, backward_of_map, linear, terms_of
from moa_dist.moe.initialize import Initializer


class RouterLogits(nn.Module):
    """Linear logits without bias, in fp32 or wider whatever the model computes in.

    bfloat16 logits tie often, and a tie broken differently changes the experts.
    """

    def __init__(self, d_model: int, num_outputs: int, init: Initializer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, d_model))
        self.init = init

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter."""
        return {"weight": self.init}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., outputs]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x.device.type):
            if has_wide_product(x) and x.dtype == self.weight.dtype:
                operands = x, self.weight, *sum_of(self.weight), terms_of(x)
                logits: Tensor = _WideProduct.apply(*operands)
                return logits
            return linear(x.to(dtype), self.weight)


def has_wide_product(x: Tensor) -> bool:
    """Whether narrow rows like `x` are multiplied into fp32 logits without being widened."""
    is_narrow = x.dtype in (torch.bfloat16, torch.float16)
    return is_narrow and Hardware.of(x.device).device_type == "cuda"


class _WideProduct(torch.autograd.Function):
    """`x @ weight.T` in fp32 for narrow x and weight, on tensor cores.

    Products of narrow numbers are exact in fp32, so only the order of the sum differs from a
    product of widened operands. Backward rounds the gradient of the logits to the narrow type, as
    that of every other matrix product is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        handle: Tensor | None = None,
        total: GradientSum | None = None,
        terms: list[Term] | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.terms = total, terms
        logits = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
        return logits.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        return *backward_of_map(grad, x, weight, ctx.total, ctx.terms), None, None, None


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    if not torch.amp.is_autocast_available(device_type):  # the meta device has none
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
