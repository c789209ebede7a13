"""What the choice of kernels depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moa_dist.kernels.triton_support import triton_problem

HAS_TRITON = triton_problem() is None
"""Whether Triton can be used; asked once, since torch.compile would trace the question."""


class Hardware(NamedTuple):
    """Hardware to run kernels on; it need not be that of this machine."""

    device_type: str
    """As in `torch.device.type`."""
    has_triton: bool = True
    """Triton is installed there, and finds a C compiler."""
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device, if known."""

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """Describe a device of this machine."""
        known = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device.type, HAS_TRITON, known)

    @property
    def runs_triton(self) -> bool:
        """Whether kernels written in Triton can run."""
        return self.device_type == "cuda" and self.has_triton
