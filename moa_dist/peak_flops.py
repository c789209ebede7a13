"""Peak FLOPs per second of GPUs, for computing model FLOPs utilization."""

from __future__ import annotations

import re

_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250e12, 75e12),
    (r"H200 NVL", 835e12, 60e12),
    (r"H200", 989e12, 67e12),
    (r"H100 PCIe", 756e12, 51e12),
    (r"H100 NVL", 835e12, 60e12),
    (r"H100", 989e12, 67e12),
    (r"A100", 312e12, 19.5e12),
    (r"L40S", 362e12, 91.6e12),
    (r"RTX 4090", 165.2e12, 82.6e12),
)
"""Name, dense bf16 on tensor cores and fp32 without TF32, from NVIDIA's data sheets. TF32 runs at
half the rate of bf16 on all of them."""


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak of a device such as `cuda (NVIDIA H100 PCIe)`; None if it is unknown."""
    for name, bf16, fp32 in _PEAKS:
        if re.search(rf"\b{name}\b", device):
            return {"bf16": bf16, "tf32": bf16 / 2, "fp32": fp32}.get(precision)
    return None
