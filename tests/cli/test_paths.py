"""A path that the file system cannot have, or refuses, ends every command in one line about it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_dist.cli.main import main

TOO_LONG = "x" * 300
ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart.yaml")
COMMANDS = [
    ("analyze", TOO_LONG),
    ("checkpoint", "average", TOO_LONG, "out", "--last", "2"),
    ("checkpoint", "show", TOO_LONG),
    ("checkpoint", "verify", TOO_LONG),
    ("config", "check", TOO_LONG),
    ("config", "check", CONFIG, f"name={TOO_LONG}"),
    ("eval", TOO_LONG),
    ("export", TOO_LONG, "out"),
    ("generate", TOO_LONG, "--prompt", "a"),
    ("hang", TOO_LONG),
    ("import", "jetmoe", TOO_LONG, "out"),
    ("plan", TOO_LONG),
    ("prepare", "--input", TOO_LONG, "--output", "out"),
    ("prepare", "--input", CONFIG, "--output", TOO_LONG),
    ("report", TOO_LONG),
    ("translate", TOO_LONG, "--input", CONFIG),
    ("upcycle", TOO_LONG, CONFIG),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words)[:20])
def test_a_name_that_is_too_long(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert (TOO_LONG in err) or ("`name`" in err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train.py", "launch.py"])
def test_an_output_that_is_too_long(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launcher" / script, "--config", CONFIG, f"output={TOO_LONG}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(TOO_LONG)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(monkeypatch, capsys, tmp_path):
    """Whoever runs this may be root, whom no permission stops: the system's answer is replaced."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["prepare", "--input", CONFIG, "--output", str(tmp_path / "out")]) == 2
    assert os.strerror(errno.EROFS) in capsys.readouterr().err
