"""The batch script for Slurm: what it asks for, and what it does when its step ends.

It runs here against fake commands; `tests/cluster/slurm.sh` runs it in a real Slurm.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.launch.slurm import SlurmJob, sbatch_script

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/small/moeut.yaml")
NODES = ["--nodes", "2", "--ranks-per-node", "1"]
WAIT_S = 60

# One node of the step; records how it was started, and ends as the next word of LAUNCHES says.
COMMANDS = {
    "srun": """
        while [[ $1 != bash ]]; do echo "$1" >>srun.options; shift; done
        export SLURMD_NODENAME=host-b SLURM_NODEID=1
        exec "$@"
    """,
    "launcher": """
        printf '%s\\n' "$MOA_DIST_HOST" "$@" >launcher.arguments
        echo "$MOA_DIST_JOB_SECRET" >>launcher.secrets
        echo start >>launcher.starts
        words=($LAUNCHES)
        word=${words[$(($(wc -l <launcher.starts) - 1))]}
        case $word in
        saves) trap 'exit 75' USR1 ;;
        dies) ;;
        *) exit "$word" ;;
        esac
        touch launcher.runs
        while :; do sleep 0.02; done
    """,
    "scontrol": """
        [[ $1 == show ]] && printf 'host-a\\nhost-b\\n' || echo "$@" >>scontrol.commands
    """,
    "squeue": """
        echo "$STATE"
    """,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with a blank in its name, and the commands on its PATH."""
    folder = tmp_path / "my runs"
    (folder / "bin").mkdir(parents=True)
    for name, text in COMMANDS.items():
        (folder / "bin" / name).write_text("#!/bin/bash\n" + text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def job(folder: Path, *arguments: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher/job.py"), "slurm", "--config", CONFIG, *arguments],
        cwd=folder, text=True, capture_output=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def directives(script: Path) -> list[str]:
    lines = script.read_text().splitlines()
    return [shlex.split(x)[1] for x in lines if x.startswith("#SBATCH ")]


def test_script_asks_for_whole_nodes_and_a_signal_and_logs_into_the_run(folder):
    output = job(
        folder, "--nodes", "2", "--gpus-per-node", "8", "--time", "1-12", "--partition", "big",
        "--account", "us", "--sbatch=--qos=high", "--grace", "120",
        "name=a 50%", "parallel.expert_parallel=8", "data.readers=16",
        "train.global_batch=64", "train.micro_batch=4",
    )  # fmt: skip
    script = folder / "runs/a 50%/job.sbatch"
    assert output == "sbatch 'runs/a 50%/job.sbatch'\n"
    assert directives(script) == [
        "--job-name=a 50%",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--time=1-12",
        "--partition=big",
        "--account=us",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
        f"--chdir={folder}",
        f"--output={folder}/runs/a 50%%/logs/slurm-%j.log",
        "--qos=high",
    ]
    assert (folder / "runs/a 50%/logs").is_dir()
    subprocess.run(["bash", "-n", script], check=True, timeout=WAIT_S)


class Batch:
    """The script, run as Slurm would run it."""

    def __init__(self, folder: Path, launches: str, *, state: str = "RUNNING") -> None:
        job(folder, *NODES, "--python", "launcher", "--srun=--container-image=a b", "name=my run",
            "output=out put", "parallel.expert_parallel=2")  # fmt: skip
        self.folder = folder
        self.process = subprocess.Popen(
            ["bash", folder / "out put/my run/job.sbatch"],
            cwd=folder,
            env=os.environ
            | {
                "PATH": f"{folder}/bin:{os.environ['PATH']}",
                "SLURM_JOB_ID": "1007",
                "SLURM_JOB_NODELIST": "host-[a-b]",
                "SLURM_JOB_NUM_NODES": "2",
                "LAUNCHES": launches,
                "STATE": state,
            },
        )

    def ask(self) -> None:
        """Send what Slurm sends before the end, twice, once the launcher runs."""
        deadline = time.monotonic() + WAIT_S
        while not (self.folder / "launcher.runs").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(2):
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> tuple[int, int, list[str]]:
        """Status, starts of the launcher, and what was asked of Slurm."""
        status = self.process.wait(WAIT_S)
        asked = self.folder / "scontrol.commands"
        starts = len(self.lines("launcher.starts"))
        return status, starts, asked.read_text().splitlines() if asked.exists() else []

    def lines(self, file: str) -> list[str]:
        return (self.folder / file).read_text().splitlines()


def test_each_node_gets_one_launcher_that_knows_the_others(folder):
    batch = Batch(folder, "0")
    assert batch.end() == (0, 1, [])
    host, script, *arguments = batch.lines("launcher.arguments")
    assert host == "host-b"
    assert script == str(ROOT / "launcher/launch.py")
    assert arguments == [
        *("--config", CONFIG, "name=my run", "output=out put", "parallel.expert_parallel=2"),
        *("--ranks", "1", "--nodes", "2", "--master-addr", "host-a", "--master-port", "21007"),
        *("--node-rank", "1"),
    ]
    assert "--container-image=a b" in batch.lines("srun.options")


def test_all_starts_of_a_job_share_a_secret_that_is_not_on_a_command_line(folder, monkeypatch):
    monkeypatch.delenv("MOA_DIST_JOB_SECRET", raising=False)
    batch = Batch(folder, "76 0")
    assert batch.end() == (0, 2, [])
    first, second = batch.lines("launcher.secrets")
    assert first == second
    assert len(bytes.fromhex(first)) == 32
    assert first not in (folder / "launcher.arguments").read_text()
    (folder / "launcher.starts").unlink()
    assert Batch(folder, "0").end()[0] == 0
    assert batch.lines("launcher.secrets")[-1] != first


def test_secret_of_the_user_is_kept(folder, monkeypatch):
    monkeypatch.setenv("MOA_DIST_JOB_SECRET", "of the user, as it is")
    batch = Batch(folder, "0")
    assert batch.end()[0] == 0
    assert batch.lines("launcher.secrets") == ["of the user, as it is"]


@pytest.mark.parametrize("status", [1, 2, 3, 4])
def test_what_a_restart_cannot_fix_ends_the_job(folder, status):
    assert Batch(folder, f"{status} 0").end() == (status, 1, [])


def test_preempted_job_is_requeued(folder):
    assert Batch(folder, "75 0").end() == (75, 1, ["requeue 1007"])


def test_canceled_job_is_not(folder):
    assert Batch(folder, "75 0", state="COMPLETING").end() == (75, 1, [])


def test_signal_reaches_the_launchers_which_may_save(folder):
    batch = Batch(folder, "saves")
    batch.ask()
    assert batch.end() == (75, 1, ["requeue 1007"])


def test_signal_that_kills_a_launcher_that_does_not_handle_it_yet_still_preempts(folder):
    batch = Batch(folder, "dies")
    batch.ask()
    assert batch.end() == (75, 1, ["requeue 1007"])


def test_lost_launchers_are_restarted_but_not_forever(folder):
    assert Batch(folder, "76 137 0").end() == (0, 3, [])
    (folder / "launcher.starts").unlink()
    assert Batch(folder, "137 137 76 0").end() == (76, 3, [])


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["--time", "5"], ["--time 5", "300 s", "--grace"]),
        (["--time", "0-0:04:59"], ["--time 0-0:04:59", "300 s", "--grace"]),
        (["--time", "a day"], ["--time a day", "D-HH:MM:SS"]),
        (["name=it's"], ["`--job-name=it's`"]),
        (["data.readers=9"], ["data.readers", "moeut on 2 x 1 ranks"]),
        (["train.stepz=9"], ["stepz", "`steps`"]),
    ],
)
def test_wrong_values_end_in_one_error_and_write_nothing(folder, arguments, quoted):
    error = job(folder, *NODES, *arguments, expect=2)
    problems = [line for line in error.splitlines() if line.startswith("  - ")]
    assert len(problems) == 1
    assert all(word in error for word in quoted)
    assert "Traceback" not in error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("limit", ["6", "5:01", "1:00:00", "0-1", "1-0:0", "1-00:00:00"])
def test_times_are_read_as_slurm_reads_them(limit):
    asked = SlurmJob(nodes=2, ranks_per_node=1, gpus=False, grace_s=300, time=limit)
    script = sbatch_script(load_config(CONFIG), asked, Path("/work"), ["launcher"])
    assert f"#SBATCH --time={limit}\n" in script
