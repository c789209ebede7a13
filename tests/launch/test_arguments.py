"""Which arguments of `launcher/launch.py` go together."""

import importlib.util
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launcher/launch.py"


@pytest.fixture(scope="module")
def launch():
    spec = importlib.util.spec_from_file_location("launch", LAUNCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NODE = "--nodes 2 --node-rank 1 --master-addr a"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (f"--hostfile f {NODE}", "leave out --nodes"),
        ("--hostfile f --ranks 2", "leave out --ranks"),
        ("--nodes 2 --master-addr a", "needs --nodes, --node-rank and --master-addr"),
        ("--node-rank 0", "needs --nodes, --node-rank and --master-addr"),
        ("--nodes 2 --node-rank 2 --master-addr a", "the 2 nodes count from 0"),
        ("--master-port 29500", "go with --hostfile or --nodes"),
        ("--ranks 0", "must be at least 1"),
        ("--hostfile f --master-port 70000", "must be from 1 to 65535"),
    ],
)
def test_misfits_are_said(launch, monkeypatch, capsys, arguments, problem):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config", "c", *arguments.split()])
    with pytest.raises(SystemExit) as error:
        launch.parse()
    assert error.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["", "--ranks 2 a=1", "--hostfile f --master-addr a", f"{NODE} --ranks 4 a=1"]
)
def test_ways_to_start(launch, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config", "c", *arguments.split()])
    assert launch.parse().config == "c"
