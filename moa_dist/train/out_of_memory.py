"""When memory does not suffice: who holds how much, and which setting to change."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from moa_dist.config.optimization_checks import can_offload
from moa_dist.config.run import Config
from moa_dist.errors import MemoryLimitError

if TYPE_CHECKING:  # the report reads what is written here, without DeepSpeed
    from moa_dist.train.engine import Engine

FOLDER = "out-of-memory"
"""Subfolder of the run's folder with `rank-N.txt` and, for GPUs, `rank-N.pickle`."""
_GIB = 2**30
_REST = "activations and all else"


@contextmanager
def explain_out_of_memory(
    engine: Engine, config: Config, run_folder: Path, step: int
) -> Iterator[None]:
    """Turn running out of memory, on the GPU or the host, into a MemoryLimitError.

    The error shows what is held and what to change. The table and, for GPUs, the allocator's
    snapshot are also written into the run's folder.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_for_want_of_memory(error):
            raise
        raise MemoryLimitError(_explain(error, engine, config, run_folder, step)) from error


def _is_for_want_of_memory(error: Exception) -> bool:
    """Tell running out of memory from other errors; torch has a class for devices only."""
    is_host = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_host


def _explain(error: Exception, engine: Engine, config: Config, run_folder: Path, step: int) -> str:
    device, rank = engine.device, engine.mesh.rank
    held = holdings(engine)
    if device.type == "cuda":
        where, used = f"GPU {device.index}", torch.cuda.memory_allocated(device)
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        where, used = "memory of the host", psutil.Process().memory_info().rss
        size = psutil.virtual_memory().total
    held[_REST] = max(used - sum(held.values()), 0)
    reason = (str(error).splitlines() or ["MemoryError"])[0][:300]
    lines = [
        f"{where} does not suffice on rank {rank} (host {socket.gethostname()}) in step {step}: "
        f"{reason}",
        *(f"  {name:<26}{num_bytes / _GIB:9.3f} GiB" for name, num_bytes in held.items()),
        f"  {'used, of ' + format(size / _GIB, '.1f') + ' GiB':<26}{used / _GIB:9.3f} GiB",
    ]
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        snapshot = folder / f"rank-{rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        lines.append(f"  every allocation: {snapshot}, at https://docs.pytorch.org/memory_viz")
    found = remedies(config, engine.mesh.world_size, held, on_gpu=device.type == "cuda")
    lines.append(f"what helps: {'; '.join(found)}")
    text = "\n".join(lines)
    (folder / f"rank-{rank}.txt").write_text(text + "\n", encoding="utf-8")
    return text


def holdings(engine: Engine) -> dict[str, int]:
    """Count bytes on this rank's device by purpose; shared memory counts once."""
    parameters = list(engine.model.parameters())
    averaged = getattr(engine.deepspeed.optimizer, "averaged_gradients", {}).values()
    optimizer = engine.optimizer
    states = [value for state in optimizer.state.values() for value in state.values()]
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    device, seen = engine.device, set[int]()
    return {
        # Under ZeRO 3 a parameter is empty between uses, and `ds_tensor` is this rank's part.
        "parameters": _num_bytes([*parameters, *map(_part, parameters)], device, seen),
        "gradients": _num_bytes(
            [
                *(p.grad for p in parameters),
                *(g for group in averaged for g in group or ()),
            ],
            device,
            seen,
        ),
        "optimizer state": _num_bytes(
            [*states, *masters, *(p.grad for p in masters)], device, seen
        ),
    }


def _part(parameter: Tensor) -> Tensor | None:
    return getattr(parameter, "ds_tensor", None)


def _num_bytes(values: Iterable[object], device: torch.device, seen: set[int]) -> int:
    total = 0
    for value in values:
        if isinstance(value, Tensor) and value.device.type == device.type:
            storage = value.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def remedies(
    config: Config, world_size: int, held: dict[str, int], *, on_gpu: bool = False
) -> list[str]:
    """List settings to change, most effective first; none of them changes results."""
    of_activations, of_state = [], []
    total, micro = config.train.global_batch, config.train.micro_batch
    smaller = [m for m in range(1, micro) if total % (world_size * m) == 0]
    if smaller:
        of_activations.append(f"train.micro_batch={smaller[-1]} (now {micro})")
    if config.train.recompute is not True:
        of_activations.append("train.recompute=true")
    stage, ep = config.parallel.zero_stage, config.parallel.expert_parallel
    has_experts = bool(config.model.routed_parts())
    larger = [n for n in range(ep + 1, world_size + 1) if world_size % n == 0 and n % ep == 0]
    if has_experts and larger:
        of_state.append(f"parallel.expert_parallel={larger[0]} (now {ep})")
    if world_size > 1 and stage < 3:
        of_state.append(f"parallel.zero_stage={stage + 1} (now {stage})")
    if on_gpu and stage > 0 and can_offload(config):
        of_state.append("optimizer.offload=host (slower)")
    state = sum(num_bytes for name, num_bytes in held.items() if name != _REST)
    first, second = (
        (of_state, of_activations) if state > held[_REST] else (of_activations, of_state)
    )
    return [*first, *second] or ["more ranks, devices with more memory, or a smaller model"]
