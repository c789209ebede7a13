"""What a rank computes on: how much it holds, and whether it repeats itself."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def min_device_memory(device: torch.device) -> int:
    """Bytes that the rank with the least can hold. Collective.

    Of a CPU, its share of the machine's memory among the ranks of this node.
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
    """Choose kernels that repeat bit for bit, before any has run on the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def should_overlap(wish: str, backend: str) -> bool:
    """`parallel.overlap` decided: `auto` overlaps where communication has engines of its own."""
    return wish == "on" or (wish == "auto" and backend == "nccl")
