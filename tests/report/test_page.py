"""The page: well-formed, self-contained, with the run's numbers, whatever the run is like."""

import json
import math
import re
import shutil
from itertools import count

import pytest

from moa_dist.cli.main import main
from moa_dist.errors import DataError
from moa_dist.observe.jsonl import FILE_NAME
from moa_dist.report.numbers import Number, headline, layout
from moa_dist.report.read import read_run
from tests.report.outline import labels_of, outline


def numbers_of(folder) -> dict[str, Number]:
    return {number.label: number for number in headline(read_run(folder))}


def test_numbers_of_a_run(write_run):
    folder = write_run()
    found, numbers = outline(folder), numbers_of(folder)
    assert layout(read_run(folder)) == "W 2 = ep 2 x edp 1, ZeRO 2, cpu, gloo, fp32"
    # 20 of 650 steps; 320 samples of 64 tokens
    assert (numbers["Steps"].text, numbers["Steps"].detail.split()[0]) == ("20", "3")
    assert "20.5k" in numbers["Steps"].detail
    assert numbers["Parameters"].text == "4.02M"
    assert "1.31M" in numbers["Parameters"].detail
    assert numbers["Training loss"].value == pytest.approx(5.0 + 1 / 60)
    assert numbers["Validation perplexity"].value == pytest.approx(90.05)
    assert numbers["Tokens per second"].value == pytest.approx(12345.678)
    assert numbers["Dead experts"].value == 2
    assert "30.0%" in numbers["Dead experts"].detail
    for number in numbers.values():
        mark = " ⚠" if number.warns else ""
        shown = f"{number.label}{mark}{number.text}{number.detail}" in found.text
        assert shown or number.label in ("Steps", "Time")
    for text in ("ffn/entropy", "stack.layers.0.ffn", "step 21 refused: <b>spike</b>"):
        assert text in found.text, text
    assert "vocab_size: 50" in found.text
    # Of MiB, 3 forward and 1 backward.
    assert re.search(r"stack\.layers\.0\.ffn4", found.text)
    assert not read_run(folder).problems


def test_nothing_from_a_file_becomes_markup(write_run):
    evil = "<script>\"alert(1)'&"
    folder = write_run("a", label=evil, aux_losses={evil: 1.0})
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    for record in records:
        if record["kind"] == "step":
            record["routing"] = {f"layer0.repeat0.{evil}": {"drop_share": 0.5}}
            record["traffic"] = {f"{evil}/{evil}": {"num_bytes": 1}}
            record["load"] = {f"layer0.repeat0.{evil}": [[1, 2]]}
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    attempt = {"attempt": evil, "began": evil, "cause": evil, "exit_code": evil, "restarts": True}
    (folder / "attempts.jsonl").write_text(f"{json.dumps(attempt)}\n")
    broken = folder / "step-00000001"
    broken.mkdir()
    (broken / "checkpoint.json").write_text(evil)
    for found in (outline(folder), outline(folder, write_run("b"))):
        assert found.text.count(evil) >= 6
        assert [evil] in [labels[-1:] for labels in labels_of(found)]


def test_values_that_are_not_finite(write_run):
    folder = write_run(loss=math.nan, grad_norm=math.inf)
    found = outline(folder)
    assert numbers_of(folder)["Training loss"].value is None
    assert labels_of(found)[0] == ["training", "validation"]
    assert found.values("class").count("none") >= 1  # the gradient norm has no picture
    folder = write_run("mixed")
    lines = (folder / FILE_NAME).read_text().splitlines()
    lines[5] = json.dumps(json.loads(lines[5]) | {"loss": None})
    (folder / FILE_NAME).write_text("\n".join(lines) + "\n")
    found = outline(folder)
    assert found.hover("curves")[0]["lines"][0]["values"].count(None) == 1
    assert found.values("class").count("bad") == 1
    assert numbers_of(folder)["Training loss"].value == pytest.approx(5.0 + 1 / 60)


def cut_line(folder):
    path = folder / FILE_NAME
    path.write_text(path.read_text().replace('{"kind": "step", "step": 11', "{", 1))


PARTS = {
    "metrics": (lambda folder: (folder / FILE_NAME).unlink(), FILE_NAME),
    "config": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml"),
    "metrics line": (cut_line, "metrics.jsonl:13"),
    "config content": (lambda folder: (folder / "config.yaml").write_text("a: [b"), "config.yaml"),
    "config bytes": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff"), "config.yaml"),
    "attempts": (lambda folder: (folder / "attempts.jsonl").write_text("{"), "attempts.jsonl"),
    "checkpoint": (lambda folder: (folder / "step-00000001").mkdir(), "step-00000001"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_damaged_part_is_named(write_run, part):
    folder = write_run()
    spoil, place = PARTS[part]
    spoil(folder)
    (problem,) = read_run(folder).problems
    assert place in problem
    found = outline(folder)
    assert "card wide warn" in found.values("class")
    assert problem in found.text
    if part != "metrics":
        assert "5.0" in found.text  # what could be read is there


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [[]], {"layer0.repeat0.ffn": "x"}])
@pytest.mark.parametrize("key", ["routing", "traffic", "aux_losses", "loss", "load", "config"])
def test_values_of_another_kind_are_left_out(write_run, key, value):
    folder = write_run(steps=range(1, 11))
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    lines = [json.dumps(r | ({key: value} if key in r else {})) for r in records]
    (folder / FILE_NAME).write_text("\n".join(lines) + "\n")
    outline(folder)


def test_several_runs(write_run):
    first, second = write_run(), write_run("other", tokens_per_second=24690.0)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("d_model: 16", "d_model: 32"))
    found = outline(first, second)
    assert "model.d_model1632" in found.text  # the row of a table
    assert "24.7k ★" in found.text
    assert "12.3k ★" not in found.text
    curves = [
        f"{run}, {curve}" for run in ("tiny", "other") for curve in ("training", "validation")
    ]
    assert labels_of(found)[0] == curves
    shutil.copytree(first, first.parent / "copy")
    assert f"tiny ({first})" in outline(first, first.parent / "copy").text


def test_checkpoints_attempts_and_refused_steps(write_run, tmp_path):
    folder = write_run()
    numbers = count(1)
    attempts = [
        {"attempt": next(numbers), "seconds": 75.2, "cause": "rank 1 was killed", "restarts": True},
        {"attempt": next(numbers), "seconds": 9, "cause": "done", "restarts": False},
    ]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in attempts))
    index = {
        "format": 2,
        "step": 20,
        "samples": 320,
        "updates": 19,
        "state": {
            "exclusions": {"train": [[64, [3, 5]]]},
            "bad_steps": {
                "given_up": [{"first": 80, "last": 95, "step": 6, "reason": "loss is a spike"}]
            },
        },
        "world_size": 2,
        "config": read_run(folder).config,
        "files": {"rank-00000.safetensors": 4_020_000},
        "shapes": {},
        "tensors": {},
    }
    (folder / "step-00000020").mkdir()
    (folder / "step-00000020/checkpoint.json").write_text(json.dumps(index))
    text, restarts = outline(folder).text, numbers_of(folder)["Restarts"]
    assert restarts.value == 1
    assert "rank 1 was killed" in restarts.detail
    assert "1m15s" in text
    assert "680 to 95loss is a spike" in text  # a row of a table
    assert "203204.02MBW 2 ep 2 ZeRO 22" in text  # the last: two shards are left out


def test_command(write_run, tmp_path, capsys):
    first, second = write_run(), write_run("other")
    assert main(["report", str(first)]) == 0
    assert str(first / "report.html") in capsys.readouterr().out
    assert (first / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(first), str(second)]) == 0
    assert (first / "comparison.html").exists()
    assert main(["report", str(first), "--output", str(tmp_path / "no/where.html")]) == 2
    assert str(tmp_path / "no/where.html") in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        assert main(["report", str(tmp_path / folder)]) == 2
        assert str(tmp_path / folder) in capsys.readouterr().err
    with pytest.raises(DataError):
        read_run(tmp_path / "empty")


def test_time_waits_traces_and_reports(write_run):
    folder = write_run(gpu={"power_watts": 351.0})
    (folder / "profile").mkdir()
    trace = {
        "steps": [2, 4],
        "rank": 1,
        "on_gpu": False,
        "milliseconds": {"experts": 30.0, "experts (backward)": 60.0, "backward": 10.0},
    }
    (folder / "profile/rank-1.parts.json").write_text(json.dumps(trace))
    (folder / "hangs/20261125-010203").mkdir(parents=True)
    (folder / "hangs/20261125-010203/summary.txt").write_text("rank 1 <sleeps>")
    (folder / "out-of-memory").mkdir()
    (folder / "out-of-memory/rank-0.txt").write_text("what helps: train.micro_batch=4")
    found, numbers = outline(folder), numbers_of(folder)
    assert numbers["Communication share"].value == pytest.approx(1 / 3)
    assert numbers["Slowest rank"].text == "rank 0"
    for word in ("node-1", "20 of 20", "1.67 x"):
        assert word in numbers["Slowest rank"].detail
    assert ["gpu power"] in labels_of(found)
    for text in (
        "rank 0 (node-1)20100%",  # rows of tables
        "experts306090.0%",
        "rest of backward01010.0%",
        "20261125-010203rank 1 <sleeps>",
        "rank-0what helps: train.micro_batch=4",
    ):
        assert text in found.text, text
    (trace,) = read_run(folder).traces
    assert (trace.rank, trace.first, trace.last, sum(trace.parts.values())) == (1, 2, 4, 100)
    (folder / "profile/rank-1.parts.json").write_text('{"steps": 3}')
    (problem,) = read_run(folder).problems
    assert "rank-1.parts.json" in problem
    assert problem in outline(folder).text
