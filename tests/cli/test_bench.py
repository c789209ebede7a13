"""`moa-dist bench` runs every section on a tiny model; what it measures is not asserted."""

import json
import re
from pathlib import Path

import pytest
import torch

from moa_dist.bench.learned import learned_layers
from moa_dist.bench.sections import SECTIONS, SHARED_SECTIONS
from moa_dist.bench.setting import Setting
from moa_dist.cli.main import main
from moa_dist.data.manifest import load_manifest
from moa_dist.data.validation import validation_batches
from moa_dist.evaluate.trained import load_trained
from moa_dist.models.calls import RouterCall

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
    late = "train.seed=5"  # words may follow any option
    assert main(["bench", *sections, *config, *TINY, *more, *FAST, late, "--json"]) == 0
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
    assert all("2 ranks, ep 2" in t["notes"][-1] for t in result["tables"])
    step = next(t for t in result["tables"] if t["title"].startswith("step"))
    here, tokens, weights = (float(row["note"].split()[0]) for row in step["rows"])
    assert here == 0 < tokens < weights  # few tokens, but as many experts as in large models
    assert not list(tmp_path.iterdir())  # checkpoints are gone


def test_one_rank_has_nothing_to_exchange(capsys, tmp_path):
    config = ("--config", str(CONFIGS / "small/moeut.yaml"), f"output={tmp_path}")
    words = [*SHARED_SECTIONS, *config, *TINY, *FAST, "--ranks", "1", "--json"]
    assert main(["bench", *words]) == 0
    out, err = capsys.readouterr()
    assert sections_of(json.loads(out[out.index("{") :])) == {"checkpoint"}
    named = {line.partition(":")[0] for line in err.splitlines()}
    assert named & set(SHARED_SECTIONS) == {"exchange", "collectives"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ("model.ffn.router.num_experts=2", "model.ffn.router.top_k=1"),
            "parallel.expert_parallel",
        ),
        (("output=FILE",), "FILE"),
    ],
    ids=["few experts", "no folder"],
)
def test_ranks_report_what_they_cannot_do(more, expected, capsys, tmp_path):
    (tmp_path / "file").touch()
    words = [word.replace("FILE", str(tmp_path / "file")) for word in more]
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"), *words)
    assert main(["bench", "checkpoint", *config, *TINY, *FAST, "--ranks", "3"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"rank \d of 3\b", error)
    assert expected.replace("FILE", str(tmp_path / "file")) in error


def test_tables_name_what_was_chosen_and_why(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", *config, *TINY, "layers", *FAST]) == 0
    printed = capsys.readouterr().out
    assert "dense, equal work" in printed
    assert "\n  kernel: " in printed


def test_layers_of_a_trained_run_choose_as_they_learned(made, capsys):
    words = ("train.precision=fp64", "parallel.zero_stage=0", "--run", str(made / "run"))
    assert main(["bench", "layers", *words, *FAST]) == 0
    printed = capsys.readouterr().out
    assert "precision fp64" in printed
    assert printed.count("experts, learned router") == 2  # attention and FFN


def test_a_learned_layer_gets_what_it_got_in_its_run(made):
    run = load_trained(made / "run")
    setting = Setting(run.config, torch.device("cpu"), sequences=2, repetitions=1)
    learned = learned_layers(setting, made / "run")
    folder = made / "data/valid"
    batches = validation_batches(folder, load_manifest(folder), rank=0, world_size=1, micro_batch=2)
    tokens, _ = next(batches)
    statistics = run.model(tokens[:, :-1]).statistics
    call = RouterCall(1, run.model.config.num_repeats - 1, "ffn")
    ffn = learned["ffn"]
    assert torch.equal(ffn.layer(*ffn.inputs).statistics[""].load, statistics[call].load)
    query, key = learned["attention"].inputs[:2]
    assert query is key  # one leaf, as in the model
    assert not ffn.layer._forward_pre_hooks


def test_an_unknown_section_is_refused(capsys):
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", "lairs", *config]) == 2
    assert "`lairs`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("layers",), "`layers`"),
        (("collectives", "--ranks", "2"), "--ranks"),
    ],
)
def test_ranks_of_a_job_measure_only_what_they_share(words, expected, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = ("--config", str(CONFIGS / "small" / "moeut.yaml"))
    assert main(["bench", *words, *config]) == 2
    assert expected in capsys.readouterr().err
