"""The rendezvous store, which listens on no more addresses than the job needs."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from moa_dist.distributed.network import choose_interfaces, is_loopback


def local_store(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """Create the store of a job whose ranks all run on this machine, according to MASTER_ADDR.

    Rank 0 listens on loopback. By default torch would listen on every address of the machine, and
    gloo on that of its host name, where anybody who can reach them could connect.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        timeout: Longest wait for the other ranks.

    Returns:
        The store, or None for a job on several machines or with a store provided by `torchrun`,
        which torch then sets up from the environment.

    Raises:
        OSError: MASTER_PORT is in use.
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
            master_listen_fd=listener.detach(),  # torch owns it from here on
        )
    else:
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return PrefixStore("default_pg", store)
