"""Initial values that depend only on the seed, the parameter's name and the expert.

Each parameter, and within an expert tensor each expert, draws from a generator of its own.
So any layout starts from the same model bit for bit, and a rank draws only its own experts.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Initializer(Protocol):
    """Draws initial values of a parameter."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw values of `shape` in fp32, on the CPU."""
        ...


@dataclass(frozen=True)
class Normal:
    """Zero-mean normal; `equal_rows` gives all rows the same norm, keeping the overall std."""

    std: float
    equal_rows: bool = False

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw values of `shape` in fp32, on the CPU."""
        values = torch.randn(shape, generator=generator) * self.std
        if self.equal_rows:
            values *= self.std * math.sqrt(shape[-1]) / values.norm(dim=-1, keepdim=True)
        return values


@dataclass(frozen=True)
class XavierUniform:
    """Uniform in +-gain * sqrt(6 / (fan_in + fan_out)) over the last two dimensions."""

    gain: float = 1.0

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw values of `shape` in fp32, on the CPU."""
        bound = self.gain * math.sqrt(6 / (shape[-1] + shape[-2]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class LastRowZero:
    """Another distribution, with zeros in the last row [d_in, d_out]: that of biases."""

    others: Initializer

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw values of `shape` in fp32, on the CPU."""
        values = self.others.draw(shape, generator)
        values[-1] = 0.0
        return values


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw values of `shape` in fp32, on the CPU."""
        return torch.full(shape, self.value)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _initializers(module: nn.Module) -> dict[str, Initializer]:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {name: Constant(float(name == "weight")) for name, _ in _own_tensors(module)}
    declared = getattr(module, "initializers", dict)
    return declared()


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill all parameters and buffers of `model` in place.

    A module declares its own in `initializers() -> {name: Initializer}`; one of expert
    tensors [E, ...] also which experts it holds, in `first_expert` and `num_local`.
    """
    for module_name, module in model.named_modules():
        initializers = _initializers(module)
        for name, tensor in _own_tensors(module):
            initializer, key = initializers[name], (seed, f"{module_name}.{name}")
            first_expert = getattr(module, "first_expert", None)
            if first_expert is None:
                tensor.copy_(initializer.draw(tensor.shape, _generator(*key)))
                continue
            tensor.zero_()  # also rows that only pad a shard
            for i, expert in enumerate(tensor[: module.num_local]):
                generator = _generator(*key, first_expert + i)
                expert.copy_(initializer.draw(expert.shape, generator))
