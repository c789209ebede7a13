"""`moa-dist bench` runs every section on a tiny model; what it measures is not asserted."""

import json
from pathlib import Path

import pytest

from moa_dist.bench.sections import SECTIONS
from moa_dist.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = (
    "model.d_model=16",
    "model.vocab_size=64",
    "data.sequence_length=8",
    "model.num_layers=2",
)
FAST = ("--sequences", "2", "--repetitions", "1", "--device", "cpu")


@pytest.mark.parametrize("name", ["small/moeut", "small/moa_moe", "jetmoe/small"])
def test_every_section_measures_something(name, capsys):
    config = ("--config", str(CONFIGS / f"{name}.yaml"))
    assert main(["bench", *SECTIONS, *config, *TINY, *FAST, "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert result["where"]["tokens"] == 16
    others = set() if name == "jetmoe/small" else {"jetmoe"}
    assert {table["section"] for table in result["tables"]} == set(SECTIONS) - others
    for table in result["tables"]:
        assert all(row["median_s"] > 0 for row in table["rows"])


def test_tables_name_what_was_chosen_and_why(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", *config, *TINY, "layers", *FAST]) == 0
    printed = capsys.readouterr().out
    assert "dense, equal work" in printed
    assert "because" in printed


def test_an_unknown_section_is_refused(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", "lairs", *config]) == 2
    assert "no section `lairs`; there are layers" in capsys.readouterr().err
