"""How this machine is named and reached in a job: its name, and the interface towards rank 0."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from collections.abc import MutableMapping

HOST_VARIABLE = "MOA_DIST_HOST"
"""Name of this machine in messages, where launchers know a better one than its own."""
_INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variable -> what makes its value a whole name: NCCL takes a bare one as a prefix."""


def host_name() -> str:
    """What messages call this machine."""
    return os.environ.get(HOST_VARIABLE) or socket.gethostname()


def is_loopback(host: str) -> bool:
    """By its spelling: a machine's own name may resolve to loopback on that machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(address: str = "127.0.0.1") -> int:
    """Free now, and not of those (from 32768 on, mostly) that the system gives away.

    It is used seconds later, when the ranks have started.
    """
    while True:
        port = random.randrange(15000, 32768)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind((address, port))
            return port


def local_address(peer: str) -> str:
    """The own address from which packets go to `peer`, an address or a name.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def interface_towards(peer: str) -> str | None:
    """Name of the interface that has the address by which this machine reaches `peer`.

    None where no interface has it, or where `peer` is another name for this machine itself.
    """
    import psutil

    own = local_address(peer)
    if is_loopback(own) and not is_loopback(peer):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == own for address in addresses):
            return str(name)
    return None


def choose_interfaces(environment: MutableMapping[str, str]) -> str:
    """Make gloo and NCCL use the interface towards MASTER_ADDR, unless one was chosen.

    Left to itself gloo takes what the host's own name resolves to, on Debian loopback, and NCCL
    the first interface, which may be another network than that by which the ranks have met.

    Returns:
        What was chosen, and why.
    """
    master = environment["MASTER_ADDR"]
    given = [name for name in _INTERFACES if name in environment]
    words = [f"{name}={environment[name]}, as set" for name in given]
    try:
        interface = interface_towards(master)
    except OSError as error:
        return "; ".join([*words, f"no route to {master} ({error}): no interface chosen"])
    if interface is None:
        words.append(f"no interface has the address by which {master} is reached")
    for name, prefix in _INTERFACES.items():
        if name not in given and interface is not None:
            environment[name] = prefix + interface
            words.append(f"{name}={prefix}{interface}, the route to {master}")
    return "; ".join(words)
