"""`launcher/quickstart.sh`: what it passes on; the commands at its end work when pasted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """\
#!{python}
# Writes down how it was called, and leaves what the quickstart reads of the result.
import os, pathlib, sys
name, *words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
if words == ["-m", "moa_dist.distributed.gpus"]:
    sys.exit(print(0))
if name == "python" and words[0] != "launcher/launch.py":
    os.execv({python!r}, ["python", *words])
with open({calls!r}, "a") as log:
    log.write("\\t".join([name, os.getcwd(), *words]) + "\\n")
if words[:1] == ["prepare"]:
    folder = pathlib.Path(words[words.index("--output") + 1], "train")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{{"vocab_size": 5000, "block_length": 32}}')
"""


class Clone:
    """A copy of the launcher in a folder of its own, with an environment of stubs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder.parent / "calls"
        shutil.copytree(ROOT / "launcher", folder / "launcher")
        shutil.copy(ROOT / "pyproject.toml", folder)
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True
        )
        for name in ("moa-dist", "python", "tensorboard"):
            stub = folder / ".venv/bin" / name
            stub.unlink(missing_ok=True)
            stub.write_text(STUB.format(python=sys.executable, calls=str(self.calls_file)))
            stub.chmod(0o755)
        checksum = subprocess.run(
            ["cksum"], stdin=(folder / "pyproject.toml").open(), capture_output=True, text=True
        ).stdout.split()[0]
        (folder / f".venv/installed-{checksum}").touch()  # as make_environment leaves it

    def shell(self, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run bash without anything of this process's environment."""
        bare = {"PATH": os.defpath, "HOME": str(self.folder.parent), "PYTHON": sys.executable}
        return subprocess.run(
            ["bash", "--noprofile", "--norc", *command],
            cwd=cwd, env=bare, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def quickstart(self, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return self.shell(cwd, os.path.relpath(self.folder / "launcher/quickstart.sh", cwd), *words)

    def calls(self) -> list[list[str]]:
        """Take the calls of stubs so far: name, working directory, arguments."""
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return [line.split("\t") for line in lines]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    return Clone(tmp_path_factory.mktemp("somewhere") / "my clone")


def test_the_commands_at_its_end_can_be_pasted(clone, tmp_path):
    """The shell that started it is in another folder, and has activated nothing."""
    done = clone.quickstart(tmp_path, "--input", "text.txt")
    assert done.returncode == 0, done.stderr
    run = next(word for word in clone.calls()[1] if word.startswith("name=")).removeprefix("name=")
    (_, last) = done.stdout.rsplit("\n== ", 1)
    commands = last.split("\n", 1)[1]
    pasted = clone.shell(tmp_path, "-ec", commands)
    assert pasted.returncode == 0, pasted.stderr
    calls = clone.calls()
    assert len(calls) == len(commands.splitlines()) - 1  # the first goes there and activates
    assert {folder for _, folder, *_ in calls} == {str(clone.folder)}
    assert sum(any(run in word for word in words) for _, _, *words in calls) >= 2


def test_settings_go_to_the_run_and_options_to_prepare(clone, tmp_path):
    (tmp_path / "a.b=c").touch()  # an input, however it reads
    words = ("--input", "a.b=c", "train.steps=7", "--documents", "line", "model.d_model=64")
    assert clone.quickstart(tmp_path, *words).returncode == 0
    check, prepare, train, *_ = clone.calls()
    assert check[-2:] == ["train.steps=7", "model.d_model=64"]
    given = prepare[prepare.index("--input") + 1 : prepare.index("--output")]
    assert given == [str(tmp_path / "a.b=c")]
    assert prepare[-2:] == ["--documents", "line"]
    assert train[-2:] == ["train.steps=7", "model.d_model=64"]
    assert {"model.vocab_size=5000", "data.sequence_length=32"} < set(train)


@pytest.mark.parametrize("words", [("text.txt",), ("--documents", "line"), ("--input",)])
def test_what_it_does_not_understand_is_refused_before_anything_runs(clone, tmp_path, words):
    assert clone.quickstart(tmp_path, *words).returncode == 2
    assert not clone.calls_file.exists()
