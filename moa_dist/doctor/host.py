"""What a host says of itself when a job is about to start on it: `python -m moa_dist.doctor.host`.

Started once on every host of a job (`moa_dist.launch.preflight`). Reads requests as lines of JSON
and answers each with a line of JSON, until its input ends. Nothing here needs other ranks.
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
from typing import Any

from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.packages import check_packages, package_versions
from moa_dist.errors import MoaDistError
from moa_dist.provenance import code_hash

_REACH_S = 5.0
_LOOKS_S = 5.0
"""A file that another host has just written may take that long to be seen over NFS."""

Message = dict[str, Any]


def report(request: Message) -> Message:
    """Facts to compare and findings of this host alone.

    `request`: `config`, a path or None, and its `overrides`; `slots`, ranks to start here, or None;
    `node`, the number of this host, and `token`, which names the files that hosts leave in the
    run's folder to see whether they share it, None if they should not.
    """
    facts = {"code": code_hash(), "Python": platform.python_version(), **package_versions()}
    findings = [f for f in guarded("package", check_packages) if f.is_fault]
    if any(finding.is_fault for finding in findings):  # the rest would fail for the same reason
        return _answer(facts, findings, num_gpus=0)
    num_gpus, driver = _gpus()
    facts["driver"] = driver
    slots = request["slots"]
    if slots is not None and 0 < num_gpus < slots:
        text = f"{slots} ranks are to start on {num_gpus} GPUs"
        findings.append(Finding("gpu", "FAULT", text, "one rank per GPU: lower its slots"))
    if request["config"] is not None:
        findings += guarded("configuration", lambda: _configuration(request, facts))
    return _answer(facts, findings, num_gpus)


def _answer(facts: dict[str, str], findings: list[Finding], num_gpus: int) -> Message:
    listed = [[f.check, f.status, f.text, f.remedy] for f in findings]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "facts": facts,
        "findings": listed,
        "num_gpus": num_gpus,
        "machine": platform.node(),
        "client": connection[0] if connection else None,
        "address": connection[2] if connection else None,
    }


def _gpus() -> tuple[int, str]:
    import torch

    from moa_dist.doctor.gpu import driver_version

    return torch.cuda.device_count(), driver_version()


def _configuration(request: Message, facts: dict[str, str]) -> Iterator[Finding]:
    from moa_dist.config import load_config, to_yaml
    from moa_dist.config.run import run_folder
    from moa_dist.doctor.configured import check_on_host

    config = load_config(request["config"], request["overrides"])
    facts["configuration"] = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]
    for name, folder in (("train", config.data.train), ("valid", config.data.valid)):
        if folder is not None:
            facts[f"{name} manifest"] = _manifest_hash(Path(folder))
    yield from check_on_host(config)
    if request["token"] is not None:
        yield from _shared(run_folder(config), request["token"], request["node"])


def _manifest_hash(folder: Path) -> str:
    from moa_dist.data.manifest import MANIFEST_FILE

    with suppress(OSError):
        return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()[:16]
    return "missing"


def probe_file(run: Path, token: str, writer: str) -> Path:
    """What `writer` leaves in a run's folder for the others to see."""
    return run / f".preflight-{token}-{writer}"


def _shared(run: Path, token: str, node: int) -> Iterator[Finding]:
    """Whether this is the folder that the launching host wrote a file in; leaves one as well."""
    theirs, deadline = probe_file(run, token, "launcher"), time.monotonic() + _LOOKS_S
    while not theirs.exists():
        if time.monotonic() > deadline:
            text = f"{run} is not the same folder as on the launching host"
            yield Finding("shared folder", "FAULT", text, SHARE_REMEDY)
            return
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(run)  # makes NFS look again
    try:
        probe_file(run, token, str(node)).touch()
    except OSError as error:
        text = f"cannot write in {run}: {error.strerror}"
        yield Finding("shared folder", "FAULT", text, "let this user write there from all hosts")


SHARE_REMEDY = "set `output` to a folder that all hosts mount (NFS, Lustre)"


def clock(request: Message) -> Message:
    """This host's, in seconds since 1970."""
    return {"time": time.time()}


class Door:
    """The port by which ranks will meet, held by rank 0's host while others try to reach it."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, request: Message) -> Message:
        """Hold `port` on `address`; answers the port, another one if `may_pick`."""
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
        """Whether it can be reached from here, and by which interface."""
        from moa_dist.distributed.network import interface_towards

        address, port = request["address"], request["port"]
        try:
            interface = interface_towards(address)
            socket.create_connection((address, port), timeout=_REACH_S).close()
        except OSError as error:
            return {"interface": None, "problem": f"cannot reach {address}:{port}: {error}"}
        return {"interface": interface, "problem": None}


def main() -> int:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what libraries print goes elsewhere
    door = Door()
    answers: dict[str, Callable[[Message], Message]] = {
        "report": report,
        "clock": clock,
        "listen": door.listen,
        "reach": door.reach,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            said = answers[request["do"]](request)
        except MoaDistError as error:
            said = {"error": str(error)}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
