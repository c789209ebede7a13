"""The GPUs that CUDA_VISIBLE_DEVICES assigns to a job on this machine.

DeepSpeed's launcher discards the variable as soon as a number of ranks is given, and with a
hostfile. Jobs are therefore started without it, and the agent of each rank restores it, so that
LOCAL_RANK counts within the list, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping

from moa_dist.distributed.gpus import CUDA_VARIABLE, hides_gpus
from moa_dist.errors import ClusterError

VISIBLE_VARIABLE = "MOA_DIST_VISIBLE_DEVICES"
"""Environment variable that carries the list from a launcher to the agents of its ranks."""


def visible_devices(environment: Mapping[str, str]) -> list[str] | None:
    """Return the listed GPUs, as indices or UUIDs; None if all GPUs of this machine are visible.

    Like CUDA, it ends the list at the first index below zero.

    Raises:
        ClusterError: The list is malformed, or names a GPU twice.
    """
    given = environment.get(CUDA_VARIABLE)
    if given is None:
        return None
    if hides_gpus(environment):
        return []
    names = [name.strip() for name in given.split(",")]
    for position, name in enumerate(names):
        if name.startswith("-") and name[1:].isdigit():
            names = names[:position]
            break
        if not name.isdigit() and not name.startswith(("GPU-", "MIG-")):
            raise ClusterError(
                f"{CUDA_VARIABLE}={given}: `{name}` is neither the index of a GPU nor a UUID that "
                "begins with GPU- or MIG-"
            )
    if len(set(names)) < len(names):
        raise ClusterError(f"{CUDA_VARIABLE}={given} names a GPU twice: every rank needs its own")
    return names


def ranks_on_visible_devices(
    environment: Mapping[str, str], ranks: int | None, present: int
) -> int | None:
    """Return how many ranks to start on this machine; None for one per GPU, or one without GPUs.

    Args:
        environment: Environment of the launcher.
        ranks: Number of ranks that the user asked for; None for one per listed GPU.
        present: Number of GPUs of this machine, see `moa_dist.distributed.gpus`.

    Raises:
        ClusterError: The list has too few GPUs, or names one that this machine lacks.
    """
    names = visible_devices(environment)
    if names is None:
        return ranks
    if not names:  # the user hides all GPUs
        return ranks or 1
    given = f"{CUDA_VARIABLE}={','.join(names)}"
    missing = [name for name in names if name.isdigit() and int(name) >= present > 0]
    if missing:
        raise ClusterError(
            f"{given} names GPU {', '.join(missing)}, but this machine has only {present}, "
            "numbered from 0"
        )
    if ranks is not None and ranks > len(names):
        raise ClusterError(
            f"--ranks {ranks} needs as many GPUs, but {given} names only {len(names)}"
        )
    return ranks or len(names)
