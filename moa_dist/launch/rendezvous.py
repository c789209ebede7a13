"""Chooses the address and port where the ranks of a job on several hosts will meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moa_dist.distributed.network import is_loopback
from moa_dist.doctor.finding import Finding
from moa_dist.launch.checked_host import Answers, CheckedHost, Message, ask_all


@dataclass
class Rendezvous:
    """Where rank 0 will listen."""

    address: str = ""
    """Its address; empty if none was found."""
    port: int = 0
    """Its port, which was free."""
    checks: Answers = field(default_factory=Answers)
    """What was found when the hosts tried to use it."""


def check_hub(
    hosts: Mapping[str, CheckedHost], answers: Mapping[str, Message], port: int
) -> Answers:
    """Check that agents can reach this process, at the address that ssh connected from."""
    calls: dict[str, Message] = {
        name: {"do": "reach", "address": answer["client"], "port": port}
        for name, answer in answers.items()
    }
    reached = ask_all(hosts, calls)
    for name, answer in reached.by_host.items():
        if answer["problem"]:
            text = f"host {name} {answer['problem']}, which is this machine"
            remedy = "allow connections on all ports between the hosts and this machine"
            reached.findings.append(Finding("network", "FAULT", text, remedy, hosts=(name,)))
    return reached


def choose_rendezvous(
    hosts: Mapping[str, CheckedHost],
    answers: Mapping[str, Message],
    *,
    address: str | None,
    port: int,
    may_pick_port: bool,
) -> Rendezvous:
    """Choose where rank 0 will listen, and let all hosts try to reach it.

    Args:
        hosts: Hosts by name; rank 0 runs on the first one.
        answers: Each host's report, which includes its connection through ssh.
        address: Address of the first host for the others; None to find it.
        port: Port to prefer.
        may_pick_port: Whether another port may be chosen if that one is in use.
    """
    first = next(iter(hosts))
    address = address or rendezvous_address(list(answers.values()))
    rendezvous = Rendezvous()
    findings = rendezvous.checks.findings
    if address is None:
        text = f"host {first} is only known to this machine by a loopback address"
        remedy = "give the address by which the others reach it: --master-addr ADDRESS"
        findings.append(Finding("network", "FAULT", text, remedy, hosts=(first,)))
        return rendezvous
    request = {"do": "listen", "port": port, "may_pick": may_pick_port}
    request["address"] = address if is_loopback(address) else ""
    rendezvous.checks = ask_all(hosts, {first: request})
    findings = rendezvous.checks.findings
    held = rendezvous.checks.by_host.get(first)
    if held is None:
        return rendezvous
    if held["problem"]:
        findings.append(_port_finding(first, port, held))
    if held["port"] is None:
        return rendezvous
    rendezvous.address, rendezvous.port = address, held["port"]
    reached = _reach(hosts, rendezvous)
    findings += reached.findings
    rendezvous.checks.unreachable += reached.unreachable
    return rendezvous


def _port_finding(host: str, wanted: int, held: Message) -> Finding:
    text = f"host {host}: {held['problem']}"
    if held["port"] is None:
        remedy = "end that process, or choose another port: --master-port N"
        return Finding("port", "FAULT", text, remedy, subject=str(wanted), hosts=(host,))
    text += f"; using {held['port']}"
    return Finding("port", "note", text, subject=str(wanted), hosts=(host,))


def _reach(hosts: Mapping[str, CheckedHost], rendezvous: Rendezvous) -> Answers:
    """Let all hosts connect to the address and port while the first host holds them."""
    first, where = next(iter(hosts)), f"{rendezvous.address}:{rendezvous.port}"
    call = {"do": "reach", "address": rendezvous.address, "port": rendezvous.port}
    reached = ask_all(hosts, dict.fromkeys(hosts, call))
    for name, answer in reached.by_host.items():
        if answer["problem"]:
            text = f"host {name} {answer['problem']}"
            remedy = (
                "allow connections on all ports between the hosts, or give an address of "
                f"{first} that they can reach: --master-addr ADDRESS"
            )
            reached.findings.append(Finding("network", "FAULT", text, remedy, hosts=(name,)))
    ways = ", ".join(
        f"{name} through {answer['interface']}"
        for name, answer in reached.by_host.items()
        if answer["interface"]
    )
    if ways:
        text = f"ranks meet at {where}: {ways}"
        reached.findings.append(Finding("network", "ok", text, subject=where))
    return reached


def rendezvous_address(answers: Sequence[Message]) -> str | None:
    """Return the address of the first of several hosts for the others, from their connections.

    Normally it is the address by which this machine reached the first host. If that is loopback,
    the first host is this machine, and the others know the address that they were called from.
    """
    seen = [answers[0]["address"], *(answer["client"] for answer in answers[1:])]
    outside = [address for address in seen if address and not is_loopback(address)]
    if outside:
        return str(outside[0])
    return "127.0.0.1" if len(answers) == 1 else None
