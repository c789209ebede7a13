"""Which arguments of `launcher/launch.py` can be combined."""

import importlib.util
import re
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
    ("arguments", "named"),
    [
        (f"--hostfile f {NODE}", ["--hostfile", "--nodes"]),
        ("--hostfile f --ranks 2", ["--hostfile", "--ranks"]),
        ("--nodes 2 --master-addr a", ["--nodes", "--node-rank", "--master-addr"]),
        ("--node-rank 0", ["--nodes", "--node-rank", "--master-addr"]),
        ("--nodes 2 --node-rank 2 --master-addr a", ["--node-rank", "--nodes"]),
        ("--master-port 29500", ["--master-addr", "--master-port", "--hostfile", "--nodes"]),
        ("--ranks 0", ["--ranks"]),
        ("--hostfile f --master-port 70000", ["--master-port"]),
    ],
)
def test_conflicting_arguments_are_named(launch, monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config", "c", *arguments.split()])
    with pytest.raises(SystemExit) as error:
        launch.parse()
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert list(dict.fromkeys(re.findall(r"--[a-z-]+", message))) == named


@pytest.mark.parametrize(
    "arguments", ["", "--ranks 2 a=1", "--hostfile f --master-addr a", f"{NODE} --ranks 4 a=1"]
)
def test_ways_to_start(launch, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--config", "c", *arguments.split()])
    assert launch.parse().config == "c"
