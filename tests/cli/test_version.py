"""The version has a single source, from which everything else takes it."""

import tomllib
from pathlib import Path

import pytest

import moa_dist
from moa_dist.cli.main import main

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"moa-dist {moa_dist.__version__}\n"


def test_the_distribution_takes_it_from_the_package():
    settings = tomllib.loads(PROJECT.read_text())
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "moa_dist.__version__"}
