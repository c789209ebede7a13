"""Answers questions about a host before a job starts on it: `python -m moa_dist.doctor.host`.

`moa_dist.launch.preflight` starts this process once on every host of a job. It reads requests as
lines of JSON and answers each with a line of JSON, until its input ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.packages import check_packages, package_versions
from moa_dist.errors import MoaDistError
from moa_dist.provenance import code_hash

if TYPE_CHECKING:
    from moa_dist.config.data import DataConfig, FolderConfig
    from moa_dist.distributed.gpus import UnusableGpus

_REACH_S = 5.0
_VISIBLE_S = 5.0
"""Time that a file written by another host may take to become visible over NFS."""

Message = dict[str, Any]


def report(request: Message) -> Message:
    """Return facts to compare with other hosts, and the findings of this host alone.

    The request holds `config`, a path or None, and its `overrides`; `slots`, the ranks to start
    here, or None; `node`, the number of this host; and `token`, part of the names of the files that
    hosts leave in the run's folder to check whether they share it, or None for no such check.
    """
    facts = {"code": code_hash(), "Python": platform.python_version(), **package_versions()}
    findings = [f for f in guarded("package", check_packages) if f.is_fault]
    if findings:  # the other checks would fail for the same reason
        return _answer(facts, findings, num_gpus=0)
    num_gpus, driver, unusable = _gpus()
    facts["driver"] = driver
    if unusable is not None:
        findings.append(Finding("gpu", "FAULT", *unusable))
    slots = request["slots"]
    if slots is not None and 0 < num_gpus < slots:
        text = f"{slots} slots for ranks, but only {num_gpus} GPUs"
        findings.append(Finding("gpu", "FAULT", text, "use at most one slot per GPU"))
    if request["config"] is not None:
        findings += guarded("configuration", lambda: _configuration(request, facts))
    return _answer(facts, findings, num_gpus)


def _answer(facts: dict[str, str], findings: list[Finding], num_gpus: int) -> Message:
    fields = ("check", "status", "text", "remedy", "subject")
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "facts": facts,
        "findings": [{name: getattr(f, name) for name in fields} for f in findings],
        "num_gpus": num_gpus,
        "machine": platform.node(),
        "client": connection[0] if connection else None,
        "address": connection[2] if connection else None,
    }


def _gpus() -> tuple[int, str, UnusableGpus | None]:
    import torch

    from moa_dist.distributed.gpus import unusable_gpus
    from moa_dist.doctor.gpu import driver_version

    return torch.cuda.device_count(), driver_version(), unusable_gpus()


def _configuration(request: Message, facts: dict[str, str]) -> Iterator[Finding]:
    from moa_dist.config import load_config, to_yaml
    from moa_dist.config.run import run_folder
    from moa_dist.doctor.configured import check_on_host

    config = load_config(request["config"], request["overrides"])
    facts["configuration"] = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]
    for folder in (*config.data.sources, *config.data.held_out):
        if found := _manifest_hash(config.data, folder):
            facts[f"{folder.label} manifest"] = found
    yield from check_on_host(config)
    if request["token"] is not None:
        yield from _shared(run_folder(config), request["token"], request["node"])


def _manifest_hash(data: DataConfig, folder: FolderConfig) -> str | None:
    """Return what hosts must agree on; None for text, which each may prepare at its first start."""
    from moa_dist.data.manifest import MANIFEST_FILE
    from moa_dist.data.places import is_unprepared, local_path

    with suppress(OSError, MoaDistError):
        if is_unprepared(data, folder):
            return None
        manifest = (local_path(data, folder) / MANIFEST_FILE).read_bytes()
        return hashlib.sha256(manifest).hexdigest()[:16]
    return "missing"


def probe_file(run: Path, token: str, writer: str) -> Path:
    """Return the path of the file that `writer` leaves in a run's folder for the others to see."""
    return run / f".preflight-{token}-{writer}"


def _shared(run: Path, token: str, node: int) -> Iterator[Finding]:
    """Check that the run's folder holds the launching host's file, and leave one there too."""
    theirs, deadline = probe_file(run, token, "launcher"), time.monotonic() + _VISIBLE_S
    while not theirs.exists():
        if time.monotonic() > deadline:
            text = f"{run} is not the same folder as on the launching host"
            yield Finding("shared folder", "FAULT", text, SHARE_REMEDY, subject=str(run))
            return
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(run)  # makes NFS refresh its cache
    try:
        probe_file(run, token, str(node)).touch()
    except OSError as error:
        text = f"cannot write to {run}: {error.strerror}"
        remedy = "give this user write permission there on all hosts"
        yield Finding("shared folder", "FAULT", text, remedy, subject=str(run))


SHARE_REMEDY = "set `output` to a folder that all hosts mount (NFS, Lustre)"


def clock(request: Message) -> Message:
    """Return this host's time in seconds since 1970."""
    return {"time": time.time()}


class RendezvousPort:
    """The port where rank 0 will listen; its host holds it while the others try to reach it."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, request: Message) -> Message:
        """Listen on `port` of `address`, or on another port if `may_pick`; returns the port."""
        from moa_dist.distributed.network import free_port
        from moa_dist.doctor.environment import port_holder

        address, port = request["address"], request["port"]
        try:
            self._listener = socket.create_server((address, port))
            return {"port": port, "problem": None}
        except OSError as error:
            holder = port_holder(port)
            problem = f"port {port} cannot be used ({os.strerror(error.errno or 0)})"
            problem += f": {holder}" if holder else ""
        if not request["may_pick"]:
            return {"port": None, "problem": problem}
        try:
            self._listener = socket.create_server((address, free_port(address)))
        except OSError as error:
            return {"port": None, "problem": f"cannot listen on {address}: {error.strerror}"}
        return {"port": self._listener.getsockname()[1], "problem": problem}

    @staticmethod
    def reach(request: Message) -> Message:
        """Try to reach the port from here; returns the interface used, or the problem."""
        from moa_dist.distributed.network import interface_towards

        address, port = request["address"], request["port"]
        try:
            interface = interface_towards(address)
            socket.create_connection((address, port), timeout=_REACH_S).close()
        except OSError as error:
            return {"interface": None, "problem": f"cannot reach {address}:{port}: {error}"}
        return {"interface": interface, "problem": None}


def main() -> int:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries does not mix with the answers
    rendezvous = RendezvousPort()
    answers: dict[str, Callable[[Message], Message]] = {
        "report": report,
        "clock": clock,
        "listen": rendezvous.listen,
        "reach": rendezvous.reach,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = answers[request["do"]](request)
        except MoaDistError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
