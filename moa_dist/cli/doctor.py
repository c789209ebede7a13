"""`moa-dist doctor`: is this machine, or are the ranks of this job, fit to train? Printing only.

Alone it reports on this machine, with `--hostfile` on all hosts of a job beside each other. Started
like training, once per rank, it compares and times the ranks. See `moa_dist.doctor`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.cli.rank_output import let_rank_0_speak
from moa_dist.doctor.finding import Finding, failed
from moa_dist.errors import ConfigError, PeerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--config", metavar="FILE", help="also check what this YAML configuration needs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--world-size",
        type=between(int, 1),
        metavar="W",
        help="number of ranks to check it for (under a launcher, its own; else expert_parallel)",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="compare the hosts that it lists (NAME slots=RANKS), as the launcher does by ssh",
    )
    parser.add_argument(
        "--ssh-args",
        metavar="ARGS",
        help='for ssh to them, such as "-p 2222"; default: PDSH_SSH_ARGS_APPEND',
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check and print; status 1 if anything is at fault."""
    if args.overrides and not args.config:
        raise ConfigError([f"`{word}` changes no --config" for word in args.overrides], "doctor")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else ranks on CPUs would slow each other
    is_rank, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    report = _Report(speaks=rank == "0", as_json=args.json)
    if args.hostfile is not None:
        for finding in _hosts(args):
            report.add(finding)
        return report.finish()
    own = _own_findings(args, is_rank)
    for finding in own:
        report.add(finding)
    if not is_rank:
        return report.finish()
    try:
        for finding in _ranks(own):
            report.add(finding)
    except Exception as error:
        report.add(failed("ranks", error))
        if rank != "0":  # which may be the one that is gone
            print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            let_rank_0_speak()
        status = report.finish()
        if isinstance(error, PeerError):
            # Not by way of the interpreter's end, where NCCL may wait for the lost rank.
            sys.stdout.flush()
            os._exit(status)
        return status
    # Rank 0's status is the job's: launchers kill all ranks at the first exit with 1.
    return report.finish() if rank == "0" else 0


def _own_findings(args: argparse.Namespace, is_rank: bool) -> list[Finding]:
    """What this process can know without others."""
    from moa_dist.doctor.environment import DEFAULT_PORT, check_environment, check_port
    from moa_dist.doctor.finding import guarded

    findings = check_environment()
    if not is_rank:  # a job holds its own port, and looks at its GPUs after they have worked
        findings += guarded("gpu", _all_gpus)
        port = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
        findings += guarded("port", lambda: check_port(int(port)))
    if args.config:
        findings += guarded("configuration", lambda: _configuration(args, is_rank))
    return findings


def _hosts(args: argparse.Namespace) -> list[Finding]:
    """What the launcher would find before it starts a job on them."""
    from moa_dist.config import load_config
    from moa_dist.doctor.environment import DEFAULT_PORT
    from moa_dist.launch.hostfile import read_hostfile
    from moa_dist.launch.preflight import Wanted
    from moa_dist.launch.ssh import given_arguments
    from moa_dist.launch.ssh_launcher import check_hosts

    config = load_config(args.config, args.overrides) if args.config else None
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    wanted = Wanted(config, args.config, args.overrides, master_port=port, may_pick_port=False)
    ssh_args = given_arguments() if args.ssh_args is None else args.ssh_args
    return check_hosts(read_hostfile(args.hostfile), wanted, ssh_args).findings


def _all_gpus() -> Iterator[Finding]:
    import torch

    from moa_dist.doctor.gpu import check_gpus

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    yield from check_gpus(devices)


def _configuration(args: argparse.Namespace, is_rank: bool) -> Iterator[Finding]:
    from moa_dist.config import load_config
    from moa_dist.doctor.configured import check_configuration

    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("configuration", "FAULT", str(problem))
        return
    world_size = args.world_size or config.parallel.expert_parallel
    if is_rank:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    yield from check_configuration(config, world_size)


def _ranks(own: list[Finding]) -> Iterator[Finding]:
    from moa_dist.distributed.start import init_distributed
    from moa_dist.doctor.rank_checks import check_ranks

    with init_distributed() as context:
        yield from check_ranks(context, own)


class _Report:
    """Prints each finding when it is known, so that a job that hangs has said what it knew."""

    def __init__(self, speaks: bool, as_json: bool) -> None:
        self._speaks, self._as_json = speaks, as_json
        self._findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        self._findings.append(finding)
        if self._speaks and not self._as_json:
            print(finding, flush=True)

    def finish(self) -> int:
        """Print what comes last; returns the exit status."""
        faults = sum(finding.is_fault for finding in self._findings)
        if self._speaks and self._as_json:
            findings = [asdict(finding) for finding in self._findings]
            print(json.dumps({"faults": faults, "findings": findings}, indent=2), flush=True)
        elif self._speaks:
            print(f"{faults} faults" if faults != 1 else "1 fault", flush=True)
        return 1 if faults else 0
