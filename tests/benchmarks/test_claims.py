"""The comparison on equal data is one: equal budgets and sizes, runs that resume, a table."""

from dataclasses import replace

import pytest

from moa_dist.config import load_config
from moa_dist.models.counts import count
from moa_dist.report.read import read_run
from tests.benchmarks import claims
from tests.benchmarks.claims import CONTENDERS, FAMILY, Training, print_table, train_all
from tests.small_shards import write_folder

LENGTH = 16


@pytest.mark.parametrize("model", FAMILY)
def test_relatives_are_as_large_as_the_dense_model_and_train_like_it(model):
    dense, relative = (load_config(CONTENDERS[name].config_file) for name in ("dense", model))
    sizes = [count(config.model, 256).total for config in (dense, relative)]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02
    for part in ("data", "optimizer", "schedule", "train", "evaluation"):
        assert getattr(relative, part) == getattr(dense, part), part


@pytest.mark.full
def test_a_model_trains_resumes_and_gets_its_line(tmp_path, monkeypatch, capsys):
    """MoEUT with Muon: it has overrides of its own. Every family trains in tests of its own."""
    model = "moeut-muon"
    data = tmp_path / "data"
    vocab_size = load_config(CONTENDERS[model].config_file).model.vocab_size
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
    contender = replace(CONTENDERS[model], rates=(8e-3,), seeds=2)
    contender = replace(contender, overrides=(*contender.overrides, *small))
    monkeypatch.setitem(CONTENDERS, model, contender)
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(claims, "TUNING_STEPS", 1)
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
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    print_table(["dense", "mor_expert"], None)
    printed = capsys.readouterr().out
    assert [row_of(model, printed)["perplexity"] for model in ("dense", "mor_expert")] == ["", ""]
    assert row_of("dense", printed)["seeds"] == "0"
    (note,) = printed.split("\n\n")[1].splitlines()
    assert note.startswith("mor_expert:")


def row_of(model: str, table: str) -> dict[str, str]:
    """Return a model's cells by column."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    (row,) = [row for row in rows if row[0] == model]
    return dict(zip(rows[0], row, strict=True))
