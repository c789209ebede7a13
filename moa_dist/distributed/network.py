"""The machine's name in messages, free ports, and the network interface toward rank 0."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from collections.abc import MutableMapping

HOST_VARIABLE = "MOA_DIST_HOST"
"""Environment variable by which a launcher overrides this machine's name in messages."""
_INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variable -> marker for an exact match: NCCL treats a bare interface name as a prefix."""


def host_name() -> str:
    """Return the name that messages use for this machine."""
    return os.environ.get(HOST_VARIABLE) or socket.gethostname()


def is_loopback(host: str) -> bool:
    """Return whether `host` is spelled as a loopback address.

    Names are not resolved: a machine's own name may resolve to loopback on that machine only.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(address: str = "127.0.0.1") -> int:
    """Return a free port below the ephemeral range, which usually starts at 32768.

    The port is used seconds later, when the ranks have started, so the system must not hand it to
    another process in the meantime.
    """
    while True:
        port = random.randrange(15000, 32768)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind((address, port))
            return port


def local_address(peer: str) -> str:
    """Return the local address from which packets are sent to `peer`, an address or a name.

    Raises:
        OSError: The name cannot be resolved, or no route exists.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def interface_towards(peer: str) -> str | None:
    """Return the name of the interface through which this machine reaches `peer`.

    Returns None if no interface has the local address, or if `peer` is this machine itself.
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
    """Make gloo and NCCL use the interface toward MASTER_ADDR, unless one is set already.

    By default gloo uses the address that the host's own name resolves to (loopback on Debian), and
    NCCL the first interface, which may belong to a different network than rank 0's address.

    Returns:
        A description of what was chosen, and why.
    """
    master = environment["MASTER_ADDR"]
    given = [name for name in _INTERFACES if name in environment]
    words = [f"{name}={environment[name]}, as set" for name in given]
    try:
        interface = interface_towards(master)
    except OSError as error:
        return "; ".join([*words, f"no route to {master} ({error}): no interface chosen"])
    if interface is None:
        words.append(f"no interface has the local address that routes to {master}")
    for name, prefix in _INTERFACES.items():
        if name not in given and interface is not None:
            environment[name] = prefix + interface
            words.append(f"{name}={prefix}{interface}, the route to {master}")
    return "; ".join(words)
