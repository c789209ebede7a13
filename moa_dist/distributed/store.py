"""The store through which ranks find each other, listening no wider than the job needs."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from moa_dist.distributed.network import choose_interfaces, is_loopback


def local_store(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """The store of a job whose ranks all are on this machine, as MASTER_ADDR says.

    Rank 0 listens on loopback. Left to itself torch would listen on every address of the
    machine, and gloo on that of its host name, for anybody who can reach them.

    Args:
        rank: this rank.
        world_size: number of ranks.
        timeout: longest wait for the other ranks.

    Returns:
        The store, or None for a job on several machines or with a store of `torchrun`'s own,
        which torch then sets up as the environment says.

    Raises:
        OSError: MASTER_PORT is taken.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not is_loopback(host):
        choose_interfaces(os.environ)
        return None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        store = TCPStore(
            host,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=timeout,
            master_listen_fd=listener.detach(),  # torch's from here on
        )
    else:
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return PrefixStore("default_pg", store)
