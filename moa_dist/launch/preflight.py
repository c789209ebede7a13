"""Checks the hosts of a job before it starts, and reports everything that is wrong at once.

Every host is queried about itself. This module compares the answers, lets the hosts try to reach
each other, and chooses the address and port where the ranks will meet.
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
from moa_dist.doctor import compare
from moa_dist.doctor.compare import RankReport, name_hosts
from moa_dist.doctor.configured import check_layout
from moa_dist.doctor.environment import DEFAULT_PORT
from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.host import SHARE_REMEDY, probe_file
from moa_dist.launch.checked_host import (
    MAX_CONCURRENT,
    Answers,
    CheckedHost,
    NoAnswerError,
    ask_all,
)
from moa_dist.launch.hostfile import Host
from moa_dist.launch.rendezvous import check_hub, choose_rendezvous

_VISIBLE_S = 5.0

Message = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """The job that the hosts must be fit for."""

    config: Config | None
    """Configuration of the run; None to only compare the hosts."""
    config_file: str | None = None
    """Path from which every host reads the configuration."""
    overrides: Sequence[str] = ()
    """Overrides of the configuration."""
    master_addr: str | None = None
    """Address of node 0 for the others; None to find it."""
    master_port: int = DEFAULT_PORT
    """Port that rank 0 should listen on."""
    may_pick_port: bool = True
    """Whether another port may be chosen if that one is in use."""
    hub_port: int | None = None
    """Port of this process for agents on hosts reached through ssh; None if it has none."""


@dataclass
class Preflight:
    """The result of the checks."""

    hosts: list[Host] = field(default_factory=list)
    """Hosts that answered, with the number of ranks to start on each."""
    findings: list[Finding] = field(default_factory=list)
    """Findings of all checks."""
    unreachable: list[str] = field(default_factory=list)
    """Hosts that cannot be reached now, but may be later."""
    master_addr: str = ""
    """Address that rank 0 will listen on."""
    master_port: int = 0
    """Port that rank 0 will listen on."""

    @property
    def faults(self) -> list[Finding]:
        """The findings that would make the job fail."""
        return [finding for finding in self.findings if finding.is_fault]


def preflight(
    hosts: Mapping[str, CheckedHost],
    slots: Sequence[int | None],
    wanted: Wanted,
) -> Preflight:
    """Check `hosts`, and compare them with each other.

    Args:
        hosts: Hosts by name, in the order of nodes.
        slots: Number of ranks of each host; None for one per GPU, or one without GPUs.
        wanted: The job that they must be fit for.
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
        text = f"cannot write to {run}: {error.strerror}"
        remedy = "fix its permissions, or change `output`"
        yield Finding("shared folder", "FAULT", text, remedy, subject=str(run))


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
    answers = _collect(found, ask_all(hosts, dict(zip(names, requests, strict=True))))
    asked = dict(zip(names, slots, strict=True))
    found.hosts = [
        Host(name, asked[name] or answer["num_gpus"] or 1) for name, answer in answers.items()
    ]
    reports = [
        RankReport(name, answer["facts"], [Finding(**finding) for finding in answer["findings"]])
        for name, answer in answers.items()
    ]
    found.findings += compare.merge(reports, "host")
    if len(reports) > 1:
        found.findings += compare.versions(_comparable(reports), "host")
    if wanted.config is not None and len(answers) == len(hosts):
        run = run_folder(wanted.config)
        found.findings += check_layout(wanted.config, sum(host.slots for host in found.hosts))
        files = {name: probe_file(run, token, str(names.index(name))) for name in answers}
        if not any(finding.check == "shared folder" for finding in found.findings):
            found.findings += _shared(run, files)
    answering = {name: hosts[name] for name in answers}
    found.findings += _clocks(answering)
    if wanted.hub_port is not None:
        _collect(found, check_hub(answering, answers, wanted.hub_port))
    if names[0] in answers:
        rendezvous = choose_rendezvous(
            answering,
            answers,
            address=wanted.master_addr,
            port=wanted.master_port,
            may_pick_port=wanted.may_pick_port,
        )
        found.master_addr, found.master_port = rendezvous.address, rendezvous.port
        _collect(found, rendezvous.checks)


def _collect(found: Preflight, answers: Answers) -> Mapping[str, Message]:
    """Add the findings about answers to those of the preflight, and return the answers."""
    found.findings += answers.findings
    found.unreachable += answers.unreachable
    return answers.by_host


def _comparable(reports: Sequence[RankReport]) -> list[RankReport]:
    """Keep the facts that all reports have; what a host lacks is a separate finding."""
    common = set.intersection(*(set(report.facts) for report in reports))
    return [
        RankReport(r.host, {k: v for k, v in r.facts.items() if k in common}, r.findings)
        for r in reports
    ]


def _shared(run: Path, files: Mapping[str, Path]) -> Iterator[Finding]:
    """Check that the file that every host wrote is visible here."""
    deadline = time.monotonic() + _VISIBLE_S
    while missing := [name for name, file in files.items() if not file.exists()]:
        if time.monotonic() > deadline:
            text = f"{run}: files written by {name_hosts(missing)} are not visible here"
            hosts = tuple(missing)
            yield Finding(
                "shared folder", "FAULT", text, SHARE_REMEDY, subject=str(run), hosts=hosts
            )
            return
        time.sleep(0.1)
    text = f"{run}: files written by every host are visible here"
    yield Finding("shared folder", "ok", text, subject=str(run))


def _clocks(hosts: Mapping[str, CheckedHost]) -> Iterator[Finding]:
    def offset(host: CheckedHost) -> float:
        before = time.time()
        there = float(host.ask({"do": "clock"})["time"])
        after = time.time()
        # The clock was read between the two, so only a larger difference is an offset.
        return max(there - after, 0.0) or min(there - before, 0.0)

    try:
        with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
            offsets = list(pool.map(offset, hosts.values()))
    except NoAnswerError as error:
        yield Finding("clocks", "FAULT", f"a host stopped answering: {error}", error.remedy)
        return
    if offsets:
        yield from compare.clocks(offsets, list(hosts), "host", "this machine")
