"""`moa-dist doctor`: diagnoses this machine, the hosts of a job, or its ranks.

Alone it reports on this machine; with `--hostfile` it compares all hosts of a job. Started like
training, once per rank, it compares and times the ranks. `moa_dist.doctor` has the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from moa_dist.cli.arguments import add_json, add_overrides, between
from moa_dist.cli.rank_output import let_rank_0_speak
from moa_dist.doctor.finding import Finding, failed
from moa_dist.errors import ConfigError, PeerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--config", metavar="FILE", help="also check the requirements of this YAML configuration"
    )
    add_overrides(parser)
    parser.add_argument(
        "--world-size",
        type=between(int, 1),
        metavar="W",
        help="number of ranks to check it for (the launcher's, or else expert_parallel)",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="compare the hosts listed in FILE (NAME slots=RANKS) by ssh, as the launcher does",
    )
    parser.add_argument(
        "--ssh-args",
        metavar="ARGS",
        help='ssh options for these hosts, such as "-p 2222" (PDSH_SSH_ARGS_APPEND)',
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the checks and print findings; returns the exit status, 1 if any is a fault."""
    if args.overrides and not args.config:
        raise ConfigError(
            [f"`{word}` needs a --config to change" for word in args.overrides], "doctor"
        )
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # otherwise ranks on CPUs would slow each other down
    is_rank, rank = "RANK" in os.environ, os.environ.get("RANK", "0")
    report = _Report(prints=rank == "0", as_json=args.json)
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
        if rank != "0":  # rank 0 may be the one that is gone
            print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            let_rank_0_speak()
        status = report.finish()
        if isinstance(error, PeerError):
            # Skip the interpreter's shutdown, where NCCL may wait for the lost rank.
            sys.stdout.flush()
            os._exit(status)
        return status
    # Rank 0's status is the job's: launchers kill all ranks at the first exit with 1.
    return report.finish() if rank == "0" else 0


def _own_findings(args: argparse.Namespace, is_rank: bool) -> list[Finding]:
    """Return what this process can check without other ranks."""
    from moa_dist.doctor.environment import DEFAULT_PORT, check_environment, check_port
    from moa_dist.doctor.finding import guarded

    findings = check_environment()
    if not is_rank:  # a job holds its own port, and checks its GPUs after timing them
        findings += guarded("gpu", _all_gpus)
        port = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
        findings += guarded("port", lambda: check_port(int(port)))
    if args.config:
        findings += guarded("configuration", lambda: _configuration(args, is_rank))
    return findings


def _hosts(args: argparse.Namespace) -> list[Finding]:
    """Return what the launcher would find on the hosts before it starts a job."""
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
    """Prints each finding at once, so that a job that hangs has reported what it found."""

    def __init__(self, prints: bool, as_json: bool) -> None:
        self._prints, self._as_json = prints, as_json
        self._findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        self._findings.append(finding)
        if self._prints and not self._as_json:
            print(finding, flush=True)

    def finish(self) -> int:
        """Print the number of faults, or all findings as JSON; returns the exit status."""
        faults = sum(finding.is_fault for finding in self._findings)
        if self._prints and self._as_json:
            findings = [asdict(finding) for finding in self._findings]
            print(json.dumps({"faults": faults, "findings": findings}, indent=2), flush=True)
        elif self._prints:
            print(f"{faults} faults" if faults != 1 else "1 fault", flush=True)
        return 1 if faults else 0
