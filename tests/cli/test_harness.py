"""The harness' own command prints what `moa-dist eval` prints."""

import sys

import pytest
import yaml

from moa_dist.cli.main import main
from moa_dist.errors import DataError
from moa_dist.evaluate import harness
from tests.evaluate.test_harness import write_task


def numbers(line: str) -> list[float]:
    return [float(cell) for cell in line.replace("|", " ").split() if cell[:2] in ("0.", "1.")]


def test_the_command_prints_what_eval_prints(made, tmp_path, monkeypatch, capsys):
    file, task = write_task("piqa", tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/piqa.yaml").write_text(yaml.safe_dump(task))
    command = ["run", "--model", "moa_dist", "--model_args", f"path={made / 'run'}"]
    command += ["--include_path", str(tmp_path / "tasks"), "--tasks", "local_piqa"]
    monkeypatch.setattr(sys, "argv", ["harness", *command])
    assert harness.main() == 0
    (theirs,) = (line for line in capsys.readouterr().out.splitlines() if "|acc " in line)
    assert main(["eval", str(made / "run"), "--tasks", f"piqa={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (ours,) = (line for line in lines if line.split()[0] == "accuracy")
    assert numbers(theirs) == numbers(ours)
    assert len(numbers(ours)) == 2


@pytest.mark.parametrize("arguments", ["", "path=x,dtype=float16"])
def test_other_arguments_are_refused(arguments):
    with pytest.raises(DataError, match="path="):
        harness.HarnessModel.create_from_arg_string(arguments)
