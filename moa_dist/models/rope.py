"""Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of dimensions turn by position.

Shapes: B sequences, H heads, T tokens, d head width, W rotated dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_dist.config.positions import RopeConfig
from moa_dist.kernels.hardware import Hardware


class Rotation(NamedTuple):
    """How far each pair of dimensions turns at each position; the same for all layers."""

    cos: Tensor
    """[B, 1, T, W / 2] or [1, 1, T, W / 2]."""
    sin: Tensor
    """Of the same shape."""

    @classmethod
    def at(cls, position: Tensor, d_head: int, config: RopeConfig, dtype: torch.dtype) -> Rotation:
        """Compute the rotation at `position` [B, T] or [1, T], rounded to `dtype` at the end."""
        width = rotated_width(d_head, config)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        pair = torch.arange(width // 2, dtype=angle_dtype, device=position.device)
        position = position[:, None, :, None].to(angle_dtype)
        angle = position * config.base ** (-2 * pair / width)
        return cls(angle.cos().to(dtype), angle.sin().to(dtype))


def rotated_width(d_head: int, config: RopeConfig) -> int:
    """Return the number of rotated dimensions, rounded down to even since they rotate in pairs."""
    return int(d_head * config.fraction + 1e-6) // 2 * 2  # 100 * 0.58 is 57.99...


def apply_rope(x: Tensor, config: RopeConfig | None, rotation: Rotation | None = None) -> Tensor:
    """Rotate the first part of the last dimension of x [..., T, d].

    `rotation` needs x [B, H, T, d]; without it, positions are 0 ... T - 1.
    """
    if config is None:
        return x
    if rotation is None:
        position = torch.arange(x.shape[-2], device=x.device)[None]
        cos, sin = (table[0, 0] for table in Rotation.at(position, x.shape[-1], config, x.dtype))
    else:
        cos, sin = (table.to(x.dtype) for table in rotation)
        if _has_kernel(x):
            rotated: Tensor = _rotate(x, cos, sin, back=False)
            return rotated
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _has_kernel(x: Tensor) -> bool:
    on_gpu = Hardware.of(x.device).runs_triton
    return on_gpu and x.dtype != torch.float64


def _run(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    from moa_dist.models.rope_kernel import rotate

    return rotate(x, cos, sin, back=back)


_rotate = torch.library.custom_op(
    "moa_dist::rotate",
    _run,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
)
_rotate.register_fake(lambda x, cos, sin, back: torch.empty_like(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _rotate(grad, *ctx.saved_tensors, back=not ctx.back), None, None, None


_rotate.register_autograd(_differentiate, setup_context=_save)
