"""The page: well-formed, self-contained, with the run's numbers, whatever the run is like."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import count

import numpy as np
import pytest

from moa_dist.cli.main import main
from moa_dist.errors import DataError
from moa_dist.observe.jsonl import FILE_NAME
from moa_dist.report.heatmap import Shades, heatmap
from moa_dist.report.page import page
from moa_dist.report.read import read_run

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def outline(*folders) -> Outline:
    found = Outline(page([read_run(folder) for folder in folders]))
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "xlink:href", "style", "onload", "onclick"}
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert found.tags.count("svg") - sum(n == "aria-hidden" for n, _ in found.attributes) == sum(
        (n, v) == ("role", "img") for n, v in found.attributes
    )
    assert "url(" not in found.text
    assert "@import" not in found.text
    return found


def test_numbers_of_a_run(write_run):
    found = outline(write_run())
    for text in (
        "W 2 = ep 2 x edp 1, ZeRO 2, cpu, gloo",
        "3 % of 650, 20.5k tokens",  # 20 of 650 steps; 320 samples of 64 tokens
        "4.02M",
        "1.31M active per token",
        "5.017",  # loss of step 20
        "90.05",  # perplexity of step 20
        "12.3k",
        "at the end, over 2 router applications; largest drop share 30.0%",
        "ffn/entropy",
        "stack.layers.0.ffn",
        "Load of every expert",
        "last validation, step 20; 4 experts",
        "step 21 refused: <b>spike</b>",
        "vocab_size: 50",
    ):
        assert text in found.text, text
    # Of MiB, 3 forward and 1 backward.
    assert re.search(r"stack\.layers\.0\.ffn4", found.text)
    assert "Missing or damaged" not in found.text


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


def test_a_long_run_stays_small(write_run):
    found = page([read_run(write_run(steps=range(1, 3001)))])
    assert len(found) < 400_000
    longest = max(len(path) for path in re.findall(r'class="line[^>]* d="([^"]*)"', found))
    assert longest < 500 * 14
    Outline(found)


def test_values_that_are_not_finite(write_run):
    found = outline(write_run(loss=math.nan, grad_norm=math.inf))
    assert "No value was reported." in found.text
    folder = write_run("mixed")
    lines = (folder / FILE_NAME).read_text().splitlines()
    lines[5] = json.dumps(json.loads(lines[5]) | {"loss": None})
    (folder / FILE_NAME).write_text("\n".join(lines) + "\n")
    found = outline(folder)
    assert "✕ was not finite" in found.text
    assert "5.017" in found.text


def cut_line(folder):
    path = folder / FILE_NAME
    path.write_text(path.read_text().replace('{"kind": "step", "step": 11', "{", 1))


PARTS = {
    "metrics": (lambda folder: (folder / FILE_NAME).unlink(), "No such file"),
    "config": (lambda folder: (folder / "config.yaml").unlink(), "No such file"),
    "metrics line": (cut_line, "metrics.jsonl:13: damaged"),
    "config content": (lambda folder: (folder / "config.yaml").write_text("a: [b"), "config.yaml"),
    "config bytes": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff"), "config.yaml"),
    "attempts": (lambda folder: (folder / "attempts.jsonl").write_text("{"), "attempts.jsonl"),
    "checkpoint": (lambda folder: (folder / "step-00000001").mkdir(), "step-00000001"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_damaged_part_is_named(write_run, part):
    folder = write_run()
    spoil, message = PARTS[part]
    spoil(folder)
    found = outline(folder)
    assert "Missing or damaged" in found.text
    assert message in found.text
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
    assert "tiny, validation" in found.text
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
            "exclusions": [[64, [3, 5]]],
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
    text = outline(folder).text
    assert "Restarts1last: rank 1 was killed" in text
    assert "1m15s" in text
    assert "680 to 95loss is a spike" in text
    assert "203204.02MBW 2 ep 2 ZeRO 22" in text  # the last: two shards are left out


def test_heatmap_joins_equal_neighbors_of_one_group():
    values = np.array([[0.0, 0.0, 0.0, 2.0], [1.0, np.nan, 1.0, 1.0]])
    shades = Shades(0.0, 2.0, has_middle=True)
    drawn = heatmap(
        "t", values, ["a", "b"], ("0", "3"), shades, about="x", num_groups=2, crossed_RC=values == 0
    )
    boxes = {c: d.count("M") for c, d in re.findall(r'<path class="(\w+)" d="([^"]*)"', drawn)}
    assert boxes == {"d0": 2, "d4": 2, "d8": 1, "cross": 3}


def test_command(write_run, tmp_path, capsys):
    first, second = write_run(), write_run("other")
    assert main(["report", str(first)]) == 0
    assert str(first / "report.html") in capsys.readouterr().out
    assert (first / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(first), str(second)]) == 0
    assert (first / "comparison.html").exists()
    assert main(["report", str(first), "--output", str(tmp_path / "no/where.html")]) == 2
    assert "--output" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        assert main(["report", str(tmp_path / folder)]) == 2
        assert "no run" in capsys.readouterr().err
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
    found = outline(folder)
    for text in (
        "Communication share33%",
        "Slowest rankrank 0on node-1, slowest in 20 of 20 reports",
        "the slowest works 1.67 x the fastest",
        "rank 0 (node-1)20100%",  # a row of a table
        "GPU power",
        "traced in steps 2 to 4; 100 in all",
        "experts306090.0%",
        "rest of backward01010.0%",
        "Hang: 20261125-010203rank 1 <sleeps>",
        "Out of memory: rank-0what helps",
    ):
        assert text in found.text, text
    (folder / "profile/rank-1.parts.json").write_text('{"steps": 3}')
    assert "rank-1.parts.json: damaged" in outline(folder).text
