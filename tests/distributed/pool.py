"""A pool of gloo ranks that outlives a test: starting ranks costs seconds, a case milliseconds."""

import gc
import itertools
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120
PRELOADED = [
    "torch",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported at the first use of ZeRO
    "moa_dist.checkpoint.checkpointer",
    "moa_dist.train.engine",
]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, pipe, prepare) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from moa_dist.distributed.start import init_distributed

    torch.set_num_threads(1)
    _never_reuse_group_names()
    prepare()
    gc.freeze()  # what imports have made stays: collections after cases need not look at it
    with init_distributed():
        while (task := _receive(pipe)) is not None:
            function, args, keywords = task
            try:
                _send(pipe, (True, function(*args, **keywords)))
            except Exception:
                _send(pipe, (False, traceback.format_exc()))
            _end_groups()


def _never_reuse_group_names() -> None:
    """Number the groups of this rank, where torch counts those that exist at the time.

    A group with the name of one that a former case has ended would find that one's addresses.
    """
    from torch.distributed import distributed_c10d

    name_of, number = distributed_c10d._hash_ranks_to_str, itertools.count()
    distributed_c10d._hash_ranks_to_str = lambda ranks: name_of([*ranks, next(number)])


def _end_groups() -> None:
    """End the process groups of a case: each one's thread polls its sockets 100 times a second.

    It does so until the last reference to the group is gone, so all engines of the case must go.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    kept = (dist.group.WORLD, groups._WORLD_GROUP)  # DeepSpeed makes its own once
    for group in list(distributed_c10d._world.pg_map):
        if not any(group is each for each in kept):
            dist.destroy_process_group(group)
    _forget_zero_3()
    gc.collect()  # an engine is a cycle


def _forget_zero_3() -> None:
    """Empty the two globals that keep every engine of ZeRO 3 alive in DeepSpeed 0.19."""
    from deepspeed.runtime.zero import parameter_offload as offload

    offload.FWD_MODULE_STACK.clear()
    coordinator = offload.PartitionedParameterCoordinator
    released = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in released.__closure__:  # around an `lru_cache` whose keys hold the engine
        cell.cell_contents.cache_clear()


def _send(pipe, value: Any) -> None:
    """By value: torch would share tensors, which takes an open file for each."""
    pipe.send_bytes(pickle.dumps(value))


def _receive(pipe) -> Any:
    return pickle.loads(pipe.recv_bytes())


def _as_is() -> None:
    """Prepare nothing."""


class Pool:
    """`world_size` ranks on this machine."""

    def __init__(self, world_size: int, prepare: Callable[[], None] = _as_is) -> None:
        """Start the ranks; each calls `prepare` before it joins the others."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = _free_port()
        self.world_size = world_size
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world_size, port, theirs, prepare), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> list[Any]:
        """`function(*args, **keywords)` on every rank at once; results in rank order."""
        for pipe in self._pipes:
            _send(pipe, (function, args, keywords))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {TIMEOUT_S} s")
            results.append(_receive(pipe))
        failures = [f"rank {r}:\n{value}" for r, (ok, value) in enumerate(results) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        for pipe in self._pipes:
            _send(pipe, None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
