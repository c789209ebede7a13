"""Plant real faults in a job, and check that `moa-dist doctor` finds each of them and no other.

    python -m tests.cluster.doctor_faults

The faults are a rank that shares its core with other processes, a host with a slow link, a host
with another version of a package, and a port in use. Hosts are network namespaces with their own
names and addresses, so this needs root, iproute2, and network access for pip. Other load on this
machine can itself be a fault that the doctor finds, so each trial has several attempts, of which
one must find the planted fault and nothing else. Exit status 1 if none does. Takes a few minutes.
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
"""Niceness of everything that is timed, so that other load on this machine matters less."""
NUM_COMPETITORS = 3
SLOW_LINK = ("tbf", "rate", "50mbit", "burst", "64kbit", "latency", "1s")
OTHER = "packaging==25.0"
"""Within the range in pyproject.toml, so only a comparison of ranks can find it."""
DOCTOR = (sys.executable, "-m", "moa_dist.cli.main", "doctor", "--json")
BUSY = (sys.executable, "-c", "while True: pass")


@dataclass(frozen=True)
class Trial:
    """A job with at most one planted fault."""

    name: str
    num_hosts: int
    expected: tuple[str, int, str] | None
    """Check, rank and subject of the fault; None if there is none."""
    environment: Mapping[str, str]
    """Additional environment of the last rank."""
    slow_link: bool = False
    """Whether the last rank's host has a slow link."""
    slow_core: bool = False
    """Whether other processes compete for the last rank's core."""


def main() -> int:
    """Run all trials; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # lets all context managers clean up
    trials = [Trial("nothing planted", 2, None, {})]
    name = f"rank 1 shares its core with {NUM_COMPETITORS} others"
    trials.append(Trial(name, 2, ("matmul", 1, ""), {}, slow_core=True))
    name = f"host node3 has a link of {SLOW_LINK[2]}"
    trials.append(Trial(name, 4, ("exchange", 3, ""), {}, slow_link=True))
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
        run(*pip, OTHER)
        name, version = OTHER.split("==")
        expected = ("versions", 1, name)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        trials.append(
            Trial(f"rank 1 has {name} {version}", 2, expected, {"PYTHONPATH": path}),
        )
        found = [attempt(trial) for trial in trials]
    found.append(busy_port())
    print(f"{sum(found)} of {len(found)} trials as expected")
    return 0 if all(found) else 1


def attempt(trial: Trial) -> bool:
    """Return whether one of the attempts found exactly the planted fault; prints all faults."""
    print(f"\n== {trial.name}", flush=True)
    for number in range(1, ATTEMPTS + 1):
        faults = [finding for finding in report_of(trial) if finding.is_fault]
        for fault in faults:
            print(fault.check, fault.text, "->", fault.remedy, flush=True)
        if trial.expected is None:
            as_expected = not faults
        else:
            check, rank, subject = trial.expected
            found = [(f.check, tuple(f.ranks), tuple(f.hosts), f.subject) for f in faults]
            as_expected = found == [(check, (rank,), (f"node{rank}",), subject)]
            as_expected = as_expected and bool(faults[0].remedy)
        if as_expected:
            print(f"as expected, in attempt {number}", flush=True)
            return True
    print(f"not as expected in {ATTEMPTS} attempts", flush=True)
    return False


def busy_port() -> bool:
    """Return whether the doctor names a port in use and its process, on this machine only."""
    print("\n== a port in use", flush=True)
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        command = run(*DOCTOR, check=False, MASTER_PORT=str(port))
    (fault,) = (finding for finding in findings(command) if finding.is_fault)
    print(fault.check, fault.text, "->", fault.remedy, flush=True)
    return (fault.check, fault.subject) == (
        "port",
        str(port),
    ) and f"pid {os.getpid()}" in fault.text


# ---- a job with one rank per host -------------------------------------------------------------


def report_of(trial: Trial) -> list[Finding]:
    """Run the doctor on the trial's job, and return rank 0's findings."""
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
    """Parse the doctor's JSON."""
    return [Finding(**finding) for finding in json.loads(output)["findings"]]


@contextmanager
def process(
    command: Sequence[str], core: int, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Run a process with raised priority on one core; kill it at the end if it still runs."""

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
    """Create hosts `node0`, `node1`, ...: network namespaces on one bridge."""
    with ExitStack() as stack:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        stack.callback(run, "ip", "link", "delete", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number in range(count):
            name, plug = f"node{number}", f"{BRIDGE}{number}"
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
            run("ip", "link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", name)
            # It would be deleted with the namespace, but only some time later.
            stack.callback(run, "ip", "link", "delete", plug)
            run("ip", "link", "set", plug, "master", BRIDGE, "up")
            run("ip", "-n", name, "address", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield


def on_host(name: str) -> tuple[str, ...]:
    """Return the prefix that runs a command on a host."""
    named = 'hostname "$0"; exec "$@"'
    return ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, name)


def run(*command: str, check: bool = True, **environment: str) -> str:
    """Run a command and return its output."""
    result = subprocess.run(
        command, check=check, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
