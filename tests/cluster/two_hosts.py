"""Run a job on two hosts: it is checked before it starts, cut off in mid-run, and continued.

    sudo env PATH=$PATH python -m tests.cluster.two_hosts [faults] [ssh] [no-ssh]

The hosts are network namespaces with their own addresses, sshd and host names, joined by a cable
that can be cut (`network.py`). DeepSpeed starts the ranks through pdsh and ssh; attention and FFN
experts are sharded across the hosts. The same is repeated without ssh. Prints every test that
passed and how long it took; exit status 1 if one failed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import psutil

from tests.cluster.network import Host, missing_tools, two_hosts

ROOT = Path(__file__).parents[2]
SECRET = {"MOA_DIST_JOB_SECRET": secrets.token_hex(32)}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | SECRET
LAUNCH = str(ROOT / "launcher/launch.py")
PARTS = ("faults", "ssh", "no-ssh")
STEPS = 60
PORT = 29500
PACKAGE, OTHER_VERSION = "tokenizers", "0.22.0"
"""Planted on one host; the version is within the range in pyproject.toml."""
END_S = 60.0
"""Time within which all processes of a job must end after the cable was cut."""
WAIT_S = 400.0
CONFIG = f"""
name: ssh
model:
  vocab_size: 300
  d_model: 16
  num_layers: 2
  attention:
    kind: switchhead
    num_heads: 2
    d_head: 8
    router: {{num_experts: 3, top_k: 2, score: sigmoid, balance: {{entropy: 0.001}}}}
  ffn:
    kind: moe
    d_expert: 8
    router: {{num_experts: 5, top_k: 2, score: sigmoid, balance: {{entropy: 0.01}}}}
data: {{train: text/train, valid: text/valid, sequence_length: 32}}
parallel: {{expert_parallel: 2, zero_stage: 2}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, global_batch: 8, micro_batch: 2}}
logging: {{every: 1, trackers: []}}
checkpoint: {{every: 2}}
"""


class CheckFailedError(Exception):
    """A check of this script failed."""


def check(holds: bool, what: str) -> None:
    """Raise CheckFailedError unless the condition holds."""
    if not holds:
        raise CheckFailedError(what)


def passed(what: str, since: float) -> None:
    """Report a test that passed."""
    print(f"passed  {what} ({time.monotonic() - since:.1f} s)", flush=True)


class Job:
    """A run and the processes that supervise it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.run, self.log = folder / "runs" / name, folder / f"{name}.log"
        self.supervisors: list[subprocess.Popen[bytes]] = []

    def start(self, host: Host, *arguments: str, log: Path | None = None) -> None:
        """Start the launcher on a host."""
        words = [sys.executable, LAUNCH, "--config", "tiny.yaml", f"name={self.name}", *arguments]
        process = host.start(*words, log=log or self.log, cwd=self.folder, **ENVIRONMENT)
        self.supervisors.append(process)

    def output(self) -> str:
        """Return the output of the leading supervisor."""
        return self.log.read_text()

    def steps(self) -> int:
        """Return the number of steps taken, including repeated ones."""
        return self.output().count("\nstep ")

    def until(self, happens: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
        """Wait until the condition holds, while the supervisors are running."""
        deadline = time.monotonic() + limit_s
        while not happens():
            alive = all(process.poll() is None for process in self.supervisors)
            check(alive, f"a supervisor ended before: {what}")
            check(time.monotonic() < deadline, f"not within {limit_s:g} s: {what}")
            time.sleep(0.2)

    def finish(self) -> list[int]:
        """Wait for the supervisors, and return their exit statuses."""
        statuses = [process.wait(timeout=WAIT_S) for process in self.supervisors]
        self.supervisors.clear()
        return statuses

    def end(self) -> None:
        """Kill the supervisors that are still running."""
        for process in self.supervisors:
            process.kill()
            process.wait()


def find_faults(folder: Path, a: Host) -> None:
    """Check that one preflight finds four faults, each with a remedy."""
    (folder / "hosts-bad").write_text("node-a slots=1\nodd-b slots=1\nnode-c slots=1\n")
    job, began = Job(folder, "faults"), time.monotonic()
    arguments = ["--hostfile", "hosts-bad", "--ssh-args", f"-F {folder}/ssh_config"]
    job.start(a, *arguments, "--master-port", str(PORT))
    statuses = job.finish()
    output = job.output()
    print(output)
    check(statuses == [2], f"exit status {statuses}")
    expected = {
        "an unreachable host": ("host", "node-c", "ssh node-c true"),
        "another package version": ("versions", f"odd-b: {PACKAGE} {OTHER_VERSION}", ""),
        "a folder that is not shared": ("shared folder", "odd-b", "`output`"),
        "a busy port": ("port", str(PORT), "--master-port"),
    }
    lines = [*output.splitlines(), ""]
    for what, (name, found, remedy) in expected.items():
        places = [
            number
            for number, line in enumerate(lines)
            if line.startswith(f"FAULT {name}") and found in line
        ]
        check(bool(places), f"{what}: not found")
        advice = lines[places[0] + 1].strip()
        check(advice.startswith("-> ") and remedy in advice, f"{what}: no remedy")
    check(not (job.run / "attempts.jsonl").exists(), "something was started")
    words = ["-m", "moa_dist.cli.main", "doctor", *arguments, "--json"]
    doctor = a.start(sys.executable, *words, log=folder / "doctor.json", cwd=folder, **ENVIRONMENT)
    check(doctor.wait(timeout=WAIT_S) == 1, "the doctor finds faults")
    faults = json.loads((folder / "doctor.json").read_text())["faults"]
    check(faults == 3, f"the doctor, which does not check the shared folder, finds {faults} faults")
    passed(f"preflight found {', '.join(expected)}; nothing was started, exit status 2", began)


def cut_and_repair(job: Job, hosts: Sequence[Host], strangers: Sequence[int] = ()) -> None:
    """Cut the cable of node-b in mid-run: the job must end, and continue after the repair.

    `strangers` are processes on the hosts that do not belong to the job.
    """
    earlier = job.steps()
    job.until(lambda: job.steps() >= earlier + 3, "3 steps")
    others = {*strangers, *(process.pid for process in job.supervisors)}

    def working() -> list[psutil.Process]:
        return [p for host in hosts for p in host.processes() if p.pid not in others]

    check(len(working()) >= 6, "launchers, agents and ranks on both hosts")
    before = working()
    hosts[1].cable("down")
    cut = time.monotonic()
    earlier, left = job.output().count("\nrestart "), before
    while left and time.monotonic() - cut < END_S:
        time.sleep(0.5)
        left = [process for process in before if is_alive(process)]
    check(not left, f"{END_S:g} s after the cable was cut, these run: {[str(p) for p in left]}")
    passed(f"cable cut: all {len(before)} processes on both hosts ended", cut)
    job.until(lambda: job.output().count("\nrestart ") > earlier, "it will be restarted")
    job.until(lambda: "waiting up to" in job.output().rpartition("\nrestart ")[2], "it waits")
    causes = attempts(job)
    cause = causes[-1]["cause"]
    named = causes[-1]["kind"] == "lost_peer" and "rank 1 (host node-b)" in cause
    check(named, f"the missing host is not named: {cause}")
    print(f"       reported cause: {cause}")
    hosts[1].cable("up")
    repaired, reached = time.monotonic(), job.steps()
    job.until(lambda: job.steps() > reached, "it continues")
    passed(f"cable repaired: continued from step {causes[-1]['checkpoint_after']}", repaired)


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not count."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def attempts(job: Job) -> list[dict]:
    """Return the records of all attempts."""
    return [json.loads(line) for line in (job.run / "attempts.jsonl").read_text().splitlines()]


def check_history(job: Job, calm: Job) -> None:
    """Check that every step is recorded once, and equals that of an undisturbed run."""
    names = ("step", "samples", "digest", "loss", "grad_norm")

    def history(one: Job) -> list[tuple]:
        records = map(json.loads, (one.run / "metrics.jsonl").read_text().splitlines())
        return [tuple(r[name] for name in names) for r in records if r["kind"] == "step"]

    check([step for step, *_ in history(job)] == list(range(1, STEPS + 1)), "every step once")
    check(history(job) == history(calm), "the same losses and norms as undisturbed")


def by_ssh(folder: Path, hosts: Sequence[Host], calm: Job, holder: int) -> None:
    """Run the job through pdsh and ssh, while process `holder` occupies its port."""
    job, began = Job(folder, "ssh"), time.monotonic()
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    arguments = ["--hostfile", "hosts", "--ssh-args", f"-F {folder}/ssh_config"]
    try:
        job.start(hosts[0], *arguments)
        job.until(lambda: job.steps() >= 2, "2 steps")
        check(f"note  port             host node-a: port {PORT} " in job.output(), "the busy port")
        for rank, name in enumerate(("node-a", "node-b")):
            log = (job.run / f"logs/attempt-01/rank-{rank}.log").read_text()
            check(f"host {name}: GLOO_SOCKET_IFNAME=eth0" in log, f"{name}'s interface")
        passed("a job across both hosts trains, ep 2; another port and eth0 were chosen", began)
        began = time.monotonic()
        job.supervisors[0].send_signal(signal.SIGTERM)
        check(job.finish() == [75], "exit status 75")
        passed("SIGTERM: saved, exit status 75", began)
        began = time.monotonic()
        job.start(hosts[0], *arguments)
        cut_and_repair(job, hosts, [holder])
        check(job.finish() == [0], "exit status 0")
        check_history(job, calm)
        passed(f"ended after step {STEPS}, bit for bit like an undisturbed run on one host", began)
    except BaseException:
        print(job.output())
        raise
    finally:
        job.end()


def without_ssh(folder: Path, hosts: Sequence[Host], calm: Job) -> None:
    """Run the job with one launcher on each host, as Slurm and Kubernetes start them."""
    job, began = Job(folder, "no-ssh"), time.monotonic()
    common = ["--nodes", "2", "--master-addr", hosts[0].address, "--master-port", "29600"]
    try:
        job.start(hosts[0], *common, "--node-rank", "0")
        job.start(hosts[1], *common, "--node-rank", "1", log=folder / "no-ssh-1.log")
        cut_and_repair(job, hosts)
        check(job.finish() == [0, 0], "exit status 0 on both")
        check_history(job, calm)
        passed("without ssh: cut, repaired, ended bit for bit like an undisturbed run", began)
    except BaseException:
        print(job.output())
        print((folder / "no-ssh-1.log").read_text())
        raise
    finally:
        job.end()


def run_parts(folder: Path, parts: Sequence[str]) -> None:
    """Run the selected parts of `PARTS` in a folder."""
    (folder / "tiny.yaml").write_text(CONFIG)
    began = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, "-m", "moa_dist.cli.main", "prepare", "--output", "text"),
            *("--input", str(ROOT / "moa_dist"), "--valid-share", "0.1", "--vocab-size", "300"),
            *("--sequence-length", "32", "--max-bytes", "100000"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=WAIT_S,
        env=os.environ | ENVIRONMENT,
    )
    installed = metadata.version(PACKAGE)
    call = Path(str(metadata.distribution(PACKAGE).locate_file("")))
    metadata_file = call / f"{PACKAGE}-{installed}.dist-info/METADATA"
    old, text = folder / "METADATA", metadata_file.read_text()
    old.write_text(text.replace(f"\nVersion: {installed}\n", f"\nVersion: {OTHER_VERSION}\n"))
    hidden = folder / "runs/faults"
    hidden.mkdir(parents=True)
    with two_hosts(folder, {metadata_file: old}, hidden) as hosts:
        calm = Job(folder, "calm")
        calm.start(hosts[0], "--ranks", "2")
        try:
            busy = 'import socket,time; s=socket.create_server(("", int("%d"))); time.sleep(9999)'
            words = [sys.executable, "-c", busy % PORT]
            holder = hosts[0].start(*words, log=folder / "busy.log")
            try:
                if "faults" in parts:
                    find_faults(folder, hosts[0])
                check(calm.finish() == [0], "the undisturbed run")
                passed(f"{STEPS} steps on one host, for comparison", began)
                if "ssh" in parts:
                    by_ssh(folder, hosts, calm, holder.pid)
            finally:
                holder.kill()
                holder.wait()
            if "no-ssh" in parts:
                without_ssh(folder, hosts, calm)
            left = [p.cmdline() for host in hosts for p in host.processes()]
            check(not left, f"processes are left: {left}")
        finally:
            calm.end()


def main() -> int:
    """Run the selected parts; returns the exit status."""
    parts = sys.argv[1:] or PARTS
    if not set(parts) <= set(PARTS):
        print(f"the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    missing = missing_tools()
    if missing or os.geteuid():
        words = f"needs root, and: apt install {' '.join(missing)}" if missing else "needs root"
        print(words, file=sys.stderr)
        return 2
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="two-hosts-"))
    try:
        run_parts(folder, parts)
    except (CheckFailedError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    passed(f"all of {', '.join(parts)}", began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
