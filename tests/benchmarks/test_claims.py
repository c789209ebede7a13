"""The comparison on equal data is one: equal budgets and sizes, runs that resume, a table."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moa_dist.models.counts import count
from moa_dist.report.read import read_run
from tests.benchmarks.claims import training
from tests.benchmarks.claims.contenders import (
    CHANGES,
    CONTENDERS,
    FAMILY,
    MASKED,
    TRANSLATION,
    of_width,
)
from tests.benchmarks.claims.curves import Curve, draw
from tests.benchmarks.claims.scaling import fit
from tests.benchmarks.claims.table import print_table
from tests.benchmarks.claims.training import Training, train_all
from tests.benchmarks.claims.translation import compare
from tests.small_shards import write_folder

LENGTH = 16


@pytest.mark.parametrize("model", FAMILY)
def test_relatives_are_as_large_as_the_dense_model_and_train_like_it(model):
    dense, relative = (CONTENDERS[name].config() for name in ("dense", model))
    sizes = [count(config.model, 256).total for config in (dense, relative)]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02
    for part in ("optimizer", "schedule", "train", "evaluation"):
        assert getattr(relative, part) == getattr(dense, part), part
    if model == "mod_squad":  # one text as two tasks
        assert {source.path for source in relative.data.sources} == {dense.data.train}
        assert [folder.path for folder in relative.data.held_out] == [dense.data.valid]
        texts = {"train": dense.data.train, "valid": dense.data.valid}
        relative = relative.model_copy(update={"data": relative.data.model_copy(update=texts)})
    assert relative.data == dense.data


@pytest.mark.parametrize("width", [48, 192])
def test_moeut_of_another_width_is_as_large_as_the_dense_model(width):
    moeut, dense = (
        count(CONTENDERS[f"{model}-{width}"].config().model, 256) for model in ("moeut", "dense")
    )
    assert abs(moeut.total / dense.total - 1) <= 0.03
    assert moeut.training.total_macs < dense.training.total_macs


def test_widths_of_the_ladder_are_in_proportion():
    """Of the comparison's own width it makes the comparison's own models."""
    for model in ("moeut", "dense"):
        assert of_width(model, 96).config() == CONTENDERS[model].config()
    exponent, error = fit([1e6, 2e6, 4e6], [3.0, 3.0 * 2**-0.1, 3.0 * 4**-0.1])
    assert exponent == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("model", CHANGES)
def test_changes_of_moeut_cost_no_more(model):
    base, changed = (count(CONTENDERS[name].config().model, 256) for name in ("moeut", model))
    assert abs(changed.total / base.total - 1) <= 0.02
    assert changed.training.total_macs <= 1.01 * base.training.total_macs


@pytest.mark.parametrize("model", MASKED)
def test_masked_models_differ_in_experts_and_gates_alone(model):
    configs = [CONTENDERS[name].config().model for name in ("masked-8e", model)]
    gates = [config.attention.router.gate for config in configs]
    assert gates == ["renormalized_detached", "raw" if model.endswith("-raw") else gates[0]]
    same = {"num_experts": 8, "gate": "raw"}
    alike = [
        config.changed(
            attention=config.attention.changed(router=config.attention.router.changed(**same))
        )
        for config in configs
    ]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("texts", ["captions", "manuals"])
def test_translators_have_the_parameters_or_the_work_of_the_dense_model(texts):
    configs = {name: CONTENDERS[name].config() for name in TRANSLATION if name.startswith(texts)}
    for part in ("data", "optimizer", "schedule", "train", "evaluation"):
        parts = [getattr(config, part) for config in configs.values()]
        assert all(one == parts[0] for one in parts), part
    counts = {name: count(config.model, 24) for name, config in configs.items()}
    dense = counts[f"{texts}-dense"]
    assert abs(counts[f"{texts}-moa"].total / dense.total - 1) <= 0.01
    for name in ("moa-8e", "moa-16e"):
        macs = counts[f"{texts}-{name}"].training.total_macs
        assert abs(macs / dense.training.total_macs - 1) <= 0.01


def test_translations_are_compared_with_those_of_the_first_model():
    references = [f"Der Mann {word} auf dem Berg ." for word in ("steht", "geht", "sitzt") * 10]
    worse = [line.replace("Berg", "Tisch") for line in references]
    similar = [references[0], *worse[1:-1], worse[-1].replace("sitzt", "liegt")]
    found = {"first": worse, "better": references, "similar": similar}
    scores, signatures = compare(found, references)
    assert scores["first"].p is None
    assert scores["similar"].p > 0.1
    assert scores["better"].bleu == pytest.approx(100)
    assert scores["better"].chrf > scores["first"].chrf
    assert scores["better"].p < 0.01
    assert "BLEU" in signatures
    assert "chrF" in signatures
    alone, _ = compare({"first": worse}, references)
    assert alone["first"].bleu == scores["first"].bleu


@pytest.mark.full
def test_a_model_trains_resumes_and_gets_its_line(tmp_path, monkeypatch, capsys):
    """MoEUT with Muon: it has overrides of its own. Every family trains in tests of its own."""
    model = "moeut-muon"
    data = tmp_path / "data"
    vocab_size = CONTENDERS[model].config().model.vocab_size
    write_folder(data, 8, vocab_size // 8, LENGTH)
    small = (
        f"data.train={data}",
        f"data.valid={data}",
        f"data.sequence_length={LENGTH}",
        "train.global_batch=4",
        "train.micro_batch=4",
        "evaluation.sequences=4",
        "schedule.warmup_steps=1",
    )
    contender = CONTENDERS[model]
    contender = replace(contender, overrides=(*contender.overrides, *small))
    contender = replace(contender, rates=(8e-3,), tuning_steps=1, seeds=2)
    monkeypatch.setitem(CONTENDERS, model, contender)
    monkeypatch.setattr(training, "RUNS", tmp_path / "runs")
    whole = Training(model, 8e-3, steps=5)

    class Interrupted(Training):
        name = whole.name

    Interrupted(model, 8e-3, steps=3).run()
    assert whole.loss() is None
    train_all([model], 5)
    run = read_run(tmp_path / "runs" / whole.name)
    assert list(run.starts) == [0, 3]
    assert run.series["loss"].steps[-1] == 5
    train_all([model], 5)  # finished, so nothing is trained again
    capsys.readouterr()
    print_table([model], 5)
    row = row_of(model, capsys.readouterr().out)
    assert row["seeds"] == "2"
    assert float(row["perplexity"]) > 1
    assert float(row["s"]) > 0


def test_the_table_marks_models_that_look_ahead_and_leaves_out_what_is_not_trained(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "RUNS", tmp_path)
    print_table(["dense", "mor_expert"], None)
    printed = capsys.readouterr().out
    assert [row_of(model, printed)["perplexity"] for model in ("dense", "mor_expert")] == ["", ""]
    assert row_of("dense", printed)["seeds"] == "0"
    (note,) = printed.split("\n\n")[1].splitlines()
    assert note.startswith("mor_expert:")


def test_hours_to_a_loss_are_interpolated(tmp_path):
    losses = np.array([[4.0, 3.0, 2.0], [4.0, 2.0, 1.0]])  # their mean: 4, 2.5, 1.5
    curve = Curve("dense", np.array([10, 20, 30]), losses, step_hours=0.5, tokens_per_step=100)
    assert curve.hours_to(2.0) == pytest.approx(12.5)
    assert curve.hours_to(4.5) == 5
    assert math.isnan(curve.hours_to(1.0))
    draw([curve, replace(curve, model="moeut")], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def row_of(model: str, table: str) -> dict[str, str]:
    """Return a model's cells by column."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in rows if row[0] == model]
    return dict(zip(rows[0], row, strict=True))
