"""Writes a batch script for Slurm that starts one launcher per node and requeues preempted jobs.

Slurm signals the batch shell some time before the time limit, or at a preemption (`--signal=B:`).
The shell forwards the signal to the launchers, whose ranks save and exit with
`ExitCode.PREEMPTED`, and requeues the job, which later continues. If a node fails, Slurm requeues
the job itself.
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
"""Name of the script in the run's folder."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")

_BODY_FILE = "slurm.sh"


@dataclass(frozen=True)
class SlurmJob:
    """The resources that a batch script requests from Slurm."""

    nodes: int
    """Number of nodes, used exclusively."""
    ranks_per_node: int
    """Number of ranks on each node."""
    gpus: bool
    """Whether each rank gets a GPU; otherwise ranks compute on CPUs."""
    grace_s: int
    """Seconds between the signal and the end of the job, enough for one step and one save."""
    time: str | None = None
    """Time limit in Slurm's format, such as `2-12:00:00`; None for the partition's limit."""
    partition: str | None = None
    """Partition to queue in; None for the default."""
    account: str | None = None
    """Account to charge; None for the default."""
    sbatch: tuple[str, ...] = ()
    """Additional options of the job, such as `--qos=high`."""
    srun: tuple[str, ...] = ()
    """Additional options of the job step, such as those for a container."""


def sbatch_script(config: Config, job: SlurmJob, folder: Path, launch: list[str]) -> str:
    """Return the text of the script.

    Args:
        config: Configuration of the run, whose folder receives the log.
        job: Resources to request.
        folder: Working folder of the job, an absolute path that all nodes see.
        launch: Command of a node's launcher, without its arguments about nodes.

    Raises:
        ConfigError: The time limit is invalid or too short, or an option cannot be written.
    """
    time_s = None if job.time is None else _seconds(job.time)
    if time_s is not None and time_s <= job.grace_s:
        raise ConfigError(
            [
                f"--time {job.time} leaves no time to train: the job is asked to save "
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
        "--mem=0",  # all memory; even an exclusive node otherwise gets only the default amount
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
    """Quote an option for an #SBATCH line."""
    if not option.isprintable() or set(option) & set("\"'\\"):
        raise ConfigError(
            [
                f"`{option}` cannot be written into a batch script, because it contains quotes, "
                "backslashes or control characters: choose another name"
            ],
            "Slurm job",
        )
    return f'"{option}"' if set(option) & set(" #") else option


def _seconds(time: str) -> int:
    """Parse a time limit in Slurm's format."""
    match = _TIME.fullmatch(time)
    if not match:
        raise ConfigError(
            [
                f"--time {time} is not a time limit in Slurm's format: write minutes, H:MM:SS, D-H "
                "or D-HH:MM:SS"
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
