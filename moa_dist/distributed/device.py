"""Properties of the device that a rank computes on: memory, precision, determinism, overlap."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
import torch.distributed as dist

from moa_dist.distributed.gpus import require_usable_gpus


def default_device() -> torch.device:
    """Return the current GPU, or the CPU of a machine without GPUs.

    Whatever computes asks here, unless a device was given, so that nothing falls back to the CPU
    unnoticed.

    Raises:
        ClusterError: Torch cannot use the GPUs of this machine, and nobody has hidden them.
    """
    require_usable_gpus()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def min_device_memory(device: torch.device) -> int:
    """Return the smallest memory capacity of any rank, in bytes. Collective.

    On CPUs the machine's memory is divided by the number of ranks on the node.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = machine // int(local_ranks)
    least = torch.tensor(memory, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def enable_determinism() -> None:
    """Select bitwise reproducible kernels; call it before the device is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def set_product_precision(precision: str) -> None:
    """Let products of fp32 matrices on GPUs use TF32, or not, as `train.precision` asks for.

    Torch raises where its older interface, `allow_tf32`, is read once this one has been used.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from malloc.h."""


def keep_freed_memory(device: torch.device) -> None:
    """Keep what tensors on a CPU free for the next ones, as torch does on a GPU.

    Otherwise glibc returns every large tensor, such as the gradient of all experts, to the system,
    and each page of the next one is faulted in anew. Does nothing for other devices, nor without
    glibc.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never


def should_overlap(setting: str, backend: str) -> bool:
    """Resolve `parallel.overlap`: `auto` means NCCL only, since gloo competes for the CPU."""
    return setting == "on" or (setting == "auto" and backend == "nccl")
