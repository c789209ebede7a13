"""Plant real faults in a job, and see `moa-dist doctor` name each with its remedy, and no other.

    python -m tests.cluster.doctor_faults

A rank whose core is used by others too, a host with a slow link, a host with another version of a
package, a port that is taken. Hosts are network namespaces with names and addresses of their own:
needs root, iproute2, and the network for pip. What else runs on this machine is at times a fault
of its own, and found: so each trial has several attempts, of which one must find what was planted
and nothing else. Exit status 1 if none does. Takes a few minutes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from moa_dist.doctor.finding import Finding

BRIDGE, NETWORK, PORT = "moa-faults", "10.214.0", 29517
ATTEMPTS, PATIENCE_S = 5, 240.0
URGENT = -10
"""Niceness of all that is timed, so that what else runs here matters less."""
NUM_COMPETITORS = 3
SLOW_LINK = ("tbf", "rate", "50mbit", "burst", "64kbit", "latency", "1s")
OTHER = "packaging==25.0"
"""In the range that pyproject.toml asks for, so only a comparison of ranks can tell."""
DOCTOR = (sys.executable, "-m", "moa_dist.cli.main", "doctor", "--json")
BUSY = (sys.executable, "-c", "while True: pass")


@dataclass(frozen=True)
class Trial:
    """A job with a fault."""

    name: str
    num_hosts: int
    expected: tuple[str, str, str] | None
    """Of the fault: its check, how its text begins, and a word of its remedy; None for none."""
    environment: Mapping[str, str]
    """Of the last rank."""
    slow_link: bool = False
    """On the last rank's host."""
    slow_core: bool = False
    """The last rank's, by processes that compete for it."""


def main() -> int:
    """Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of all that cleans up
    trials = [Trial("nothing planted", 2, None, {})]
    trials.append(
        Trial(
            f"rank 1 shares its core with {NUM_COMPETITORS} others",
            2,
            ("matmul", "slow: rank 1 (host node1), ", "see what else runs there"),
            {},
            slow_core=True,
        )
    )
    trials.append(
        Trial(
            f"host node3 has a link of {SLOW_LINK[2]}",
            4,
            ("exchange", "slow: rank 3 (host node3), ", "links"),
            {},
            slow_link=True,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
        run(*pip, OTHER)
        name, version = OTHER.split("==")
        expected = ("alike", f"rank 1 (host node1): {name} {version}, but ", "install the same")
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        trials.append(
            Trial(f"rank 1 has {name} {version}", 2, expected, {"PYTHONPATH": path}),
        )
        found = [attempt(trial) for trial in trials]
    found.append(busy_port())
    print(f"{sum(found)} of {len(found)} trials as they should be")
    return 0 if all(found) else 1


def attempt(trial: Trial) -> bool:
    """Whether one of the attempts found exactly the fault; prints what it said."""
    print(f"\n== {trial.name}", flush=True)
    for number in range(1, ATTEMPTS + 1):
        faults = [finding for finding in report_of(trial) if finding.is_fault]
        for fault in faults:
            print(fault.check, fault.text, "->", fault.remedy, flush=True)
        if trial.expected is None:
            as_expected = not faults
        else:
            check, text, remedy = trial.expected
            as_expected = len(faults) == 1 and (
                faults[0].check == check
                and faults[0].text.startswith(text)
                and remedy in faults[0].remedy
            )
        if as_expected:
            print(f"as it should be, in attempt {number}", flush=True)
            return True
    print(f"not so in {ATTEMPTS} attempts", flush=True)
    return False


def busy_port() -> bool:
    """Whether a port that a process of ours holds is named, on this machine alone."""
    print("\n== a taken port", flush=True)
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        command = run(*DOCTOR, check=False, MASTER_PORT=str(port))
    (fault,) = (finding for finding in findings(command) if finding.is_fault)
    print(fault.check, fault.text, "->", fault.remedy, flush=True)
    return f"port {port} " in fault.text and f"(pid {os.getpid()})" in fault.text


# ---- a job of a rank per host -----------------------------------------------------------------


def report_of(trial: Trial) -> list[Finding]:
    """What rank 0 says."""
    cores = sorted(os.sched_getaffinity(0))
    last = trial.num_hosts - 1
    core = [cores[rank % len(cores)] for rank in range(trial.num_hosts)]
    with ExitStack() as stack:
        stack.enter_context(hosts(trial.num_hosts))
        if trial.slow_link:
            run("tc", "-n", f"node{last}", "qdisc", "add", "dev", "eth0", "root", *SLOW_LINK)
        for _ in range(NUM_COMPETITORS if trial.slow_core else 0):
            stack.enter_context(process(BUSY, core[last], {}))
        environment = {
            "WORLD_SIZE": str(trial.num_hosts),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": f"{NETWORK}.1",
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        ranks = []
        for rank in range(trial.num_hosts):
            own = environment | {"RANK": str(rank)} | (trial.environment if rank == last else {})
            command = (*on_host(f"node{rank}"), *DOCTOR)
            ranks.append(stack.enter_context(process(command, core[rank], own)))
        output, _ = ranks[0].communicate(timeout=PATIENCE_S)
        for rank in ranks[1:]:
            rank.communicate(timeout=PATIENCE_S)
    return findings(output)


def findings(output: str) -> list[Finding]:
    """Of a doctor's JSON."""
    return [Finding(**finding) for finding in json.loads(output)["findings"]]


@contextmanager
def process(
    command: Sequence[str], core: int, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Started, urgent and on one core; killed at the end if it still runs."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        os.setpriority(os.PRIO_PROCESS, 0, URGENT)

    started = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, preexec_fn=prepare
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@contextmanager
def hosts(count: int) -> Iterator[None]:
    """`node0`, `node1`, ...: namespaces on one bridge."""
    with ExitStack() as stack:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        stack.callback(run, "ip", "link", "delete", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number in range(count):
            name, plug = f"node{number}", f"{BRIDGE}{number}"
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
            run("ip", "link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", name)
            # Would go with the namespace, but some time later.
            stack.callback(run, "ip", "link", "delete", plug)
            run("ip", "link", "set", plug, "master", BRIDGE, "up")
            run("ip", "-n", name, "address", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield


def on_host(name: str) -> tuple[str, ...]:
    """What to put before a command."""
    named = 'hostname "$0"; exec "$@"'
    return ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, name)


def run(*command: str, check: bool = True, **environment: str) -> str:
    """Its output."""
    result = subprocess.run(
        command, check=check, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
