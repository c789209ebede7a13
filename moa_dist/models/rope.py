"""Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of dimensions turn by position.

Shapes: B sequences, H heads, T tokens, d head width, W rotated dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_dist.config.positions import RopeConfig, RopeScalingConfig
from moa_dist.kernels.hardware import Hardware


class Rotation(NamedTuple):
    """How far each pair of dimensions turns at each position, times the factor of YaRN if any."""

    cos: Tensor
    """[B, 1, T, W / 2] or [1, 1, T, W / 2]."""
    sin: Tensor
    """Of the same shape."""

    @classmethod
    def at(cls, position: Tensor, d_head: int, config: RopeConfig, dtype: torch.dtype) -> Rotation:
        """Compute the rotation at `position` [B, T] or [1, T], rounded to `dtype` at the end."""
        angle_dtype = torch.promote_types(dtype, torch.float32)
        speed = turning_speed(d_head, config, angle_dtype, position.device)
        angle = position[:, None, :, None].to(angle_dtype) * speed
        cos, sin = angle.cos(), angle.sin()
        if (factor := attention_factor(config)) != 1:
            cos, sin = cos * factor, sin * factor
        return cls(cos.to(dtype), sin.to(dtype))


def rotated_width(d_head: int, config: RopeConfig) -> int:
    """Return the number of rotated dimensions, rounded down to even since they rotate in pairs."""
    return int(d_head * config.fraction + 1e-6) // 2 * 2  # 100 * 0.58 is 57.99...


def turning_speed(
    d_head: int, config: RopeConfig, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Compute the angle [W / 2] by which each pair of dimensions turns from token to token."""
    width, scaling = rotated_width(d_head, config), config.scaling
    pair = torch.arange(width // 2, dtype=dtype, device=device)
    speed = config.base ** (-2 * pair / width)
    if scaling is None:
        return speed
    if scaling.kind == "linear":
        return speed / scaling.factor
    first, last = _blended_pairs(width, config.base, scaling)
    slowed = ((pair - first) / (last - first)).clamp(0, 1)
    return speed * (1 - slowed) + speed / scaling.factor * slowed


def _blended_pairs(width: int, base: float, scaling: RopeScalingConfig) -> tuple[float, float]:
    """Return the pairs between which YaRN goes from full speed to slow (equations 17 to 19)."""
    length = scaling.original_length
    assert length is not None

    def pair_with(turns: float) -> float:
        """Return which pair turns so often within the original length."""
        return width * math.log(length / (2 * math.pi * turns)) / 2 / math.log(base)

    first, last = pair_with(scaling.fast_turns), pair_with(scaling.slow_turns)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return first, last if last != first else last + 0.001


def attention_factor(config: RopeConfig) -> float:
    """Return what rotated queries and keys are multiplied by (YaRN, equation 21)."""
    scaling = config.scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def apply_rope(x: Tensor, config: RopeConfig | None, rotation: Rotation | None = None) -> Tensor:
    """Rotate the first part of the last dimension of x [..., T, d].

    A `rotation` needs x [B, H, T, d]; without one, positions are 0 ... T - 1, turned as in
    `config`, which may be None for no rotation.
    """
    if rotation is None:
        if config is None:
            return x
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
