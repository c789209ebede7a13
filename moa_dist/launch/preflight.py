"""What a job on several hosts would fail by, found before it starts and said all at once.

Every host is asked about itself; here the answers are laid side by side, the hosts are made to
reach each other, and the address and port by which ranks will meet are chosen.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_dist.config.run import Config, run_folder
from moa_dist.distributed.network import is_loopback
from moa_dist.doctor import compare
from moa_dist.doctor.compare import RankReport, name_hosts
from moa_dist.doctor.configured import check_layout
from moa_dist.doctor.environment import DEFAULT_PORT
from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.host import SHARE_REMEDY, probe_file
from moa_dist.launch.checked_host import CheckedHost, NoAnswerError
from moa_dist.launch.hostfile import Host

_MOST_AT_ONCE = 64
_LOOKS_S = 5.0

Message = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What the hosts are to be fit for."""

    config: Config | None
    """None for a comparison of hosts alone."""
    config_file: str | None = None
    """Where every host reads it."""
    overrides: Sequence[str] = ()
    """Changes to it."""
    master_addr: str | None = None
    """Address of node 0 for the others; None to find it."""
    master_port: int = DEFAULT_PORT
    """Where rank 0 is to listen."""
    may_pick_port: bool = True
    """Another one, if that is taken."""
    hub_port: int | None = None
    """Where this process listens for hosts that ssh reaches; None if it does not."""


@dataclass
class Preflight:
    """What was found."""

    hosts: list[Host] = field(default_factory=list)
    """Of those that answered, with the ranks to start there."""
    findings: list[Finding] = field(default_factory=list)
    """All of them."""
    unreachable: list[str] = field(default_factory=list)
    """Hosts that may be there later."""
    master_addr: str = ""
    """Where rank 0 will listen."""
    master_port: int = 0
    """Free there."""

    @property
    def faults(self) -> list[Finding]:
        """What the job would fail by."""
        return [finding for finding in self.findings if finding.is_fault]


def preflight(
    hosts: Mapping[str, CheckedHost],
    slots: Sequence[int | None],
    wanted: Wanted,
) -> Preflight:
    """Ask and compare `hosts`, in the order of nodes.

    Args:
        hosts: by name.
        slots: ranks of each; None for one per GPU, or one.
        wanted: what for.
    """
    found = Preflight()
    run = None if wanted.config is None else run_folder(wanted.config)
    token = secrets.token_hex(4)
    try:
        if run is not None:
            found.findings += guarded("shared folder", lambda: _leave_file(run, token))
        if not found.faults:
            _examine(found, hosts, slots, wanted, token)
    finally:
        if run is not None:
            for path in run.glob(f".preflight-{token}-*"):
                path.unlink(missing_ok=True)
    return found


def _leave_file(run: Path, token: str) -> Iterator[Finding]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe_file(run, token, "launcher").touch()
    except OSError as error:
        text = f"cannot write in {run}: {error.strerror}"
        yield Finding("shared folder", "FAULT", text, "mend its permissions, or change `output`")


def _examine(
    found: Preflight,
    hosts: Mapping[str, CheckedHost],
    slots: Sequence[int | None],
    wanted: Wanted,
    token: str,
) -> None:
    names = list(hosts)
    requests: list[Message] = [
        {
            "do": "report",
            "config": wanted.config_file,
            "overrides": list(wanted.overrides),
            "slots": own,
            "node": node,
            "token": None if wanted.config is None else token,
        }
        for node, own in enumerate(slots)
    ]
    answers = _ask_all(found, hosts, dict(zip(names, requests, strict=True)))
    asked = dict(zip(names, slots, strict=True))
    found.hosts = [
        Host(name, asked[name] or answer["num_gpus"] or 1) for name, answer in answers.items()
    ]
    reports = [
        RankReport(name, answer["facts"], [Finding(*finding) for finding in answer["findings"]])
        for name, answer in answers.items()
    ]
    found.findings += [finding for finding, _ in compare.said_by(reports, name_hosts)]
    if len(reports) > 1:
        found.findings += compare.alike(_comparable(reports), name_hosts)
    if wanted.config is not None and len(answers) == len(hosts):
        run = run_folder(wanted.config)
        found.findings += check_layout(wanted.config, sum(host.slots for host in found.hosts))
        files = {name: probe_file(run, token, str(names.index(name))) for name in answers}
        if not any(finding.check == "shared folder" for finding in found.findings):
            found.findings += _shared(run, files)
    answering = {name: hosts[name] for name in answers}
    found.findings += _clocks(answering)
    if wanted.hub_port is not None:
        _reach_back(found, answering, answers, wanted.hub_port)
    if names[0] in answers:
        _choose_meeting(found, answering, answers, wanted)


def _comparable(reports: Sequence[RankReport]) -> list[RankReport]:
    """With the facts that all of them know: what a host lacks is a finding of its own."""
    common = set.intersection(*(set(report.facts) for report in reports))
    return [
        RankReport(r.host, {k: v for k, v in r.facts.items() if k in common}, r.findings)
        for r in reports
    ]


def _ask_all(
    found: Preflight, hosts: Mapping[str, CheckedHost], requests: Mapping[str, Message]
) -> dict[str, Message]:
    """Answers by host, in order; hosts without one become findings."""

    def ask(name: str) -> Message | NoAnswerError:
        try:
            return hosts[name].ask(requests[name])
        except NoAnswerError as error:
            return error

    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        said = dict(zip(requests, pool.map(ask, requests), strict=True))
    answers: dict[str, Message] = {}
    for name, answer in said.items():
        if isinstance(answer, NoAnswerError):
            found.findings.append(Finding("host", "FAULT", f"host {name} {answer}", answer.remedy))
            found.unreachable += [name] if answer.unreachable else []
        else:
            answers[name] = answer
    return answers


def _shared(run: Path, files: Mapping[str, Path]) -> Iterator[Finding]:
    """Whether what every host wrote is seen here."""
    deadline = time.monotonic() + _LOOKS_S
    while missing := [name for name, file in files.items() if not file.exists()]:
        if time.monotonic() > deadline:
            text = f"{run}: what {name_hosts(range(len(missing)), missing)} wrote is not seen here"
            yield Finding("shared folder", "FAULT", text, SHARE_REMEDY)
            return
        time.sleep(0.1)
    text = f"{run}: written by every host and seen here"
    yield Finding("shared folder", "ok", text)


def _clocks(hosts: Mapping[str, CheckedHost]) -> Iterator[Finding]:
    def offset(host: CheckedHost) -> float:
        before = time.time()
        there = float(host.ask({"do": "clock"})["time"])
        after = time.time()
        # It was read between the two; only what that cannot explain counts.
        return max(there - after, 0.0) or min(there - before, 0.0)

    try:
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            offsets = list(pool.map(offset, hosts.values()))
    except NoAnswerError as error:
        yield Finding("clocks", "FAULT", f"a host stopped answering: {error}", error.remedy)
        return
    if offsets:
        yield from compare.clocks(offsets, list(hosts), name_hosts, "this machine")


def _reach_back(
    found: Preflight, hosts: Mapping[str, CheckedHost], answers: Mapping[str, Message], port: int
) -> None:
    """Whether agents will reach this process, where ssh comes from."""
    calls = {
        name: {"do": "reach", "address": answer["client"], "port": port}
        for name, answer in answers.items()
    }
    for name, answer in _ask_all(found, hosts, calls).items():
        if answer["problem"]:
            text = f"host {name} {answer['problem']}, which is this machine"
            remedy = "let all ports through between the hosts and this machine"
            found.findings.append(Finding("network", "FAULT", text, remedy))


def _choose_meeting(
    found: Preflight,
    hosts: Mapping[str, CheckedHost],
    answers: Mapping[str, Message],
    wanted: Wanted,
) -> None:
    """Where rank 0 will listen, tried from everywhere while its host holds the port."""
    first = next(iter(hosts))
    address = wanted.master_addr or meeting_address(list(answers.values()))
    if address is None:
        text = f"host {first} is known to this machine by a loopback address alone"
        remedy = "say by which address the others reach it: --master-addr ADDRESS"
        found.findings.append(Finding("network", "FAULT", text, remedy))
        return
    request = {"do": "listen", "port": wanted.master_port, "may_pick": wanted.may_pick_port}
    request["address"] = address if is_loopback(address) else ""
    held = _ask_all(found, hosts, {first: request}).get(first)
    if held is None:
        return
    if held["port"] is None:
        text = f"host {first}: {held['problem']}"
        remedy = "end that process, or choose another port: --master-port N"
        found.findings.append(Finding("port", "FAULT", text, remedy))
        return
    if held["problem"]:
        text = f"host {first}: {held['problem']}; taking {held['port']}"
        found.findings.append(Finding("port", "note", text))
    found.master_addr, found.master_port = address, held["port"]
    reach = {"do": "reach", "address": address, "port": held["port"]}
    reached = _ask_all(found, hosts, dict.fromkeys(hosts, reach))
    for name, answer in reached.items():
        if answer["problem"]:
            text = f"host {name} {answer['problem']}"
            remedy = (
                "let all ports through between the hosts, or name an address of "
                f"{first} that they reach: --master-addr ADDRESS"
            )
            found.findings.append(Finding("network", "FAULT", text, remedy))
    ways = ", ".join(f"{name} by {a['interface']}" for name, a in reached.items() if a["interface"])
    if ways:
        text = f"ranks meet at {address}:{held['port']}: {ways}"
        found.findings.append(Finding("network", "ok", text))


def meeting_address(answers: Sequence[Message]) -> str | None:
    """Address of the first of several hosts for the others, from what ssh connected.

    Normally that by which this machine reached it. If that is loopback, it is this machine, and
    the others know where they were called from.
    """
    seen = [answers[0]["address"], *(answer["client"] for answer in answers[1:])]
    outside = [address for address in seen if address and not is_loopback(address)]
    if outside:
        return str(outside[0])
    return "127.0.0.1" if len(answers) == 1 else None
