"""`moa-dist bench` runs every section on a tiny model; what it measures is not asserted."""

import json
from pathlib import Path

import pytest

from moa_dist.bench.sections import SECTIONS, SHARED_SECTIONS
from moa_dist.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = (
    "model.d_model=16",
    "model.vocab_size=64",
    "data.sequence_length=8",
    "model.num_layers=2",
)
FAST = ("--sequences", "2", "--repetitions", "1", "--device", "cpu")


def measured(sections, name: str, capsys, *more: str) -> dict:
    config = ("--config", str(CONFIGS / f"{name}.yaml"))
    assert main(["bench", *sections, *config, *TINY, *more, *FAST, "--json"]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed[printed.index("{") :])


def sections_of(result: dict) -> set[str]:
    return {table["section"] for table in result["tables"]}


@pytest.mark.parametrize("name", ["small/moeut", "small/moa_moe", "jetmoe/small"])
def test_every_section_measures_something(name, capsys):
    result = measured(SECTIONS, name, capsys)
    assert result["where"]["tokens"] == 16
    others = set() if name == "jetmoe/small" else {"jetmoe"}
    assert sections_of(result) == set(SECTIONS) - others
    for table in result["tables"]:
        assert all(row["median_s"] > 0 for row in table["rows"])


def test_sections_of_several_ranks_start_them(capsys, tmp_path):
    result = measured(SHARED_SECTIONS, "small/moeut", capsys, f"output={tmp_path}")
    assert sections_of(result) == set(SHARED_SECTIONS)
    assert all("W 2" in t["title"] or "2 ranks" in t["title"] for t in result["tables"])
    step = next(t for t in result["tables"] if t["title"].startswith("step"))
    here, tokens, weights = (row["note"] for row in step["rows"])
    assert here.startswith("0.0 MiB")
    assert tokens != here != weights
    assert not list(tmp_path.iterdir())  # checkpoints are gone


def test_one_rank_has_nothing_to_exchange(capsys, tmp_path):
    one = ("--ranks", "1", f"output={tmp_path}")
    result = measured(SHARED_SECTIONS, "small/moeut", capsys, one[2], *one[:2])
    assert sections_of(result) == {"checkpoint"}


def test_ranks_say_what_they_cannot_do(capsys, tmp_path):
    (tmp_path / "file").touch()
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"), f"output={tmp_path / 'file'}")
    assert main(["bench", "checkpoint", *config, *TINY, *FAST]) == 2
    said = capsys.readouterr().err
    assert "rank 0 of 2" in said
    assert str(tmp_path / "file") in said


def test_tables_name_what_was_chosen_and_why(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", *config, *TINY, "layers", *FAST]) == 0
    printed = capsys.readouterr().out
    assert "dense, equal work" in printed
    assert "because" in printed


def test_layers_of_a_trained_run_choose_as_they_learned(made, capsys):
    assert main(["bench", "layers", "--run", str(made / "run"), *FAST]) == 0
    printed = capsys.readouterr().out
    assert printed.count("experts, learned router") == 2  # attention and FFN
    assert "learned router: fullest expert" in printed


def test_an_unknown_section_is_refused(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", "lairs", *config]) == 2
    assert "no section `lairs`; there are layers" in capsys.readouterr().err


def test_ranks_of_a_job_measure_only_what_they_share(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", "layers", *config]) == 2
    assert "`layers` is measured by one process" in capsys.readouterr().err
