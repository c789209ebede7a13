"""A batch script for Slurm: one launcher per node, requeued where the job was preempted.

Slurm tells the batch shell some time before the time limit, or at a preemption, that the job will
end (`--signal=B:`). The shell passes that on to the launchers, whose ranks save and end with
`ExitCode.PREEMPTED`, and puts the job back into the queue, from where it continues. A node that
Slurm finds dead requeues the job without its help.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from moa_dist.config.run import Config, run_folder
from moa_dist.errors import ConfigError, ExitCode

SCRIPT_FILE = "job.sbatch"
"""In the run's folder."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")

_BODY_FILE = "slurm.sh"


@dataclass(frozen=True)
class SlurmJob:
    """What a batch script asks Slurm for."""

    nodes: int
    """Nodes, all of them whole."""
    ranks_per_node: int
    """Ranks on each."""
    gpus: bool
    """A GPU for each rank; otherwise they compute on CPUs."""
    grace_s: int
    """From the signal to the end, for one step and one save."""
    time: str | None = None
    """Time limit as Slurm writes it, such as `2-12:00:00`; None for the partition's."""
    partition: str | None = None
    """Where to queue; None for the default."""
    account: str | None = None
    """Who pays; None for the default."""
    sbatch: tuple[str, ...] = ()
    """Further options of the job, such as `--qos=high`."""
    srun: tuple[str, ...] = ()
    """Further options of the step, such as a container's."""


def sbatch_script(config: Config, job: SlurmJob, folder: Path, launch: list[str]) -> str:
    """The script.

    Args:
        config: of the run, whose folder gets the log.
        job: what to ask for.
        folder: where the job works, as an absolute path that all nodes see.
        launch: command of a node's launcher, without what it must know of the nodes.

    Raises:
        ConfigError: Slurm could not read what would be written.
    """
    time_s = None if job.time is None else _seconds(job.time)
    if time_s is not None and time_s <= job.grace_s:
        raise ConfigError(
            [
                f"the time limit {job.time} leaves no time to train: the job is asked to save "
                f"{job.grace_s} s before its end (see --grace)"
            ],
            "Slurm job",
        )
    log = folder / run_folder(config) / "logs" / "slurm-"
    options = [
        f"--job-name={config.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={job.ranks_per_node}"] if job.gpus else []),
        "--exclusive",
        "--mem=0",  # all of it; a whole node otherwise still comes with the default amount
        *([f"--time={job.time}"] if job.time else []),
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        f"--signal=B:USR1@{job.grace_s}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={folder}",
        f"--output={str(log).replace('%', '%%')}%j.log",
        *job.sbatch,
    ]
    head = [
        "#!/bin/bash",
        *(f"#SBATCH {_quoted(option)}" for option in options),
        "",
        f"launch=({shlex.join([*launch, '--ranks', str(job.ranks_per_node)])})",
        f"srun=({shlex.join(job.srun)})",
        *(f"{code.name}={code.value}" for code in (ExitCode.PREEMPTED, ExitCode.LOST_PEER)),
        "",
    ]
    return "\n".join(head) + files("moa_dist.launch").joinpath(_BODY_FILE).read_text()


def _quoted(option: str) -> str:
    """As `sbatch` reads a line of a script."""
    if not option.isprintable() or set(option) & set("\"'\\"):
        raise ConfigError(
            [
                f"`{option}` cannot be written into a batch script, for its quotes, backslashes "
                "or control characters: choose other names"
            ],
            "Slurm job",
        )
    return f'"{option}"' if set(option) & set(" #") else option


def _seconds(time: str) -> int:
    """A time limit as Slurm writes it."""
    match = _TIME.fullmatch(time)
    if not match:
        raise ConfigError(
            [
                f"`{time}` is no time limit that Slurm knows: write minutes, H:MM:SS, D-H or "
                "D-HH:MM:SS"
            ],
            "Slurm job",
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"]:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) < 3:  # minutes, or minutes and seconds
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return (hours * 60 + minutes) * 60 + seconds
