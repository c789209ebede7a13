"""Pictures tell the values under the pointer, and stay small whatever the run is like."""

import json
import math
import re

import numpy as np
import pytest

from moa_dist.models.calls import RouterCall
from moa_dist.observe.jsonl import FILE_NAME
from moa_dist.report.heatmap import MOST_CELLS, Grid, Shades, heatmap, merge_factor
from moa_dist.report.page import page
from moa_dist.report.read import read_run
from moa_dist.report.routing import load_grid, routing_figures
from tests.report.outline import NOW, Outline, labels_of, outline


def test_what_the_pointer_is_over(write_run):
    found = outline(write_run())
    assert labels_of(found)[0] == ["training", "validation"]
    losses = found.hover("curves")[0]["lines"]
    training, validation = losses
    assert training["steps"] == list(range(1, 21))
    assert training["values"] == pytest.approx([5 + 1 / (3 * s) for s in training["steps"]], 1e-4)
    assert validation["steps"] == [10, 20]
    drop_share = found.hover("cells")[0]
    assert drop_share["rows"] == ["L0 R0", "L0 R1"]
    assert drop_share["values"] == [[0.3] * 20, [0] * 20]
    assert len(drop_share["columns"]) == 20
    # Without scripts, titles say what the pointer is over.
    assert found.tags.count("title") > 1 + found.tags.count("svg") - found.tags.count("li")


def test_loads_of_thousands_of_experts_share_cells(write_run):
    folder = write_run()
    lines = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    load = [[1.0] * 9, [2.0] * 9]
    load[1][4], load[1][7] = 0.0, 11.0
    for record in lines:
        if record["kind"] == "validation":
            record["load"] = {"layer0.repeat0.ffn": load}
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in lines))
    run = read_run(folder)
    grid = load_grid(run.loads[0][1][RouterCall(0, 0, "ffn")].reshape(1, -1), ["L0"], 2, 4)
    assert grid.values_RC.tolist() == [[1, 1, 1, 2, 11, 2]]
    assert grid.blackened_RC.tolist() == [[False, False, False, False, True, False]]
    assert len(set(grid.columns)) == 6
    assert merge_factor((48, 1920), 1) * MOST_CELLS >= 48 * 1920
    assert merge_factor((48, 85), 1) == 1


def test_a_long_run_stays_small(write_run):
    found = page([read_run(write_run(steps=range(1, 3001)))], NOW)
    assert len(found) < 400_000
    longest = max(len(path) for path in re.findall(r'class="line[^>]* d="([^"]*)"', found))
    assert longest < 500 * 14
    Outline(found)


def test_a_long_run_of_a_large_model_stays_below_the_limit(write_run):
    """As large as configs/moeut/100b.yaml, with numbers of which no two neighbors are equal."""
    rng = np.random.default_rng(0)
    folder = write_run(steps=range(1, 2))
    start, step, *_ = (json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines())
    shapes = {"attention.output": (16, 16), "attention.value": (16, 16), "ffn": (1, 1920)}
    calls = [f"layer{i % 12}.repeat{i // 12}.{router}" for i in range(48) for router in shapes]
    records = [start]
    for number in range(1, 401):
        values = iter(rng.random(4 * len(calls) + 100).tolist())
        for name in ("loss", "grad_norm", "lr", "tokens_per_second", "communication_share"):
            step[name] = next(values)
        measures = ("drop_share", "entropy", "load_imbalance", "dead_experts")
        step["routing"] = {call: {name: next(values) for name in measures} for call in calls}
        step["traffic"] = {
            f"stack.layers.{i}.ffn/{purpose}": {"num_bytes": int(2**20 * next(values))}
            for i in range(12)
            for purpose in ("dispatch", "combine", "reduce")
        }
        records.append(step | {"step": number})
    for number in (1, 400):
        load = {
            call: rng.integers(0, 200, shapes[call.split(".", 2)[2]]).tolist() for call in calls
        }
        records.append({"kind": "validation", "step": number, "loss": 5.0, "load": load})
    records.sort(key=lambda record: record["step"])
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(folder)
    assert not run.problems
    assert len(run.loads) == 2
    assert 500_000 < len(page([run], NOW).encode()) < 1_500_000


def test_heatmap_joins_equal_neighbors_of_one_group():
    values = np.array([[0.0, 0.0, 0.0, 2.0], [1.0, np.nan, 1.0, 1.0]])
    shades = Shades(0.0, 2.0, has_middle=True)
    grid = Grid(values, ["a", "b"], [*"0123"], ("0", "3"), num_groups=2, blackened_RC=values == 0)
    drawn = heatmap("t", grid, shades, about="x")
    boxes = {c: d.count("M") for c, d in re.findall(r'<path class="(\w+)" d="([^"]*)"', drawn)}
    assert boxes == {"d0": 2, "d4": 2, "d8": 1, "dead": 3}


def test_colors_mean_the_same_for_all_routers(write_run):
    """Equal shares of routers of other sizes have equal colors; the possible maximum fits."""
    folder = write_run()
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    for record in records:
        if record["kind"] == "start":
            record["routers"] = {
                "ffn": {"groups": 1, "experts": 400, "choices": 4},
                "attention": {"groups": 2, "experts": 4, "choices": 2},
            }
        if record["kind"] == "step":
            shared = {"drop_share": 0.03, "load_imbalance": 1.7}
            record["routing"] = {
                "layer0.repeat0.ffn": shared
                | {"dead_experts": 100.0, "entropy": 0.6 * math.log(400)},
                "layer0.repeat0.attention": shared
                | {"dead_experts": 2.0, "entropy": 0.6 * math.log(4)},
            }
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    figures = routing_figures(read_run(folder))

    def colors(figure: str) -> list[str]:
        return re.findall(r'<path class="([qd]\d)"', figure)

    measures = zip(figures["ffn"][:4], figures["attention"][:4], strict=True)
    keys = []
    for ffn, attention in measures:
        assert colors(ffn) == colors(attention) != []
        assert keys_of(ffn) == keys_of(attention)
        keys.append(keys_of(ffn))
    dropped, imbalance, entropy, dead = keys
    assert dropped == dead
    assert dropped[-1] == entropy[-1] == "100%"
    assert imbalance[-1] == "100"  # 400 experts of which a token chooses 4
    assert "25%" in figures["ffn"][3]  # 100 of 400
    assert [plot["percent"] for plot in outline(folder).hover("cells")][:2] == [True, False]


def keys_of(figure: str) -> list[str]:
    """Return the labels below the colors of a figure."""
    return re.findall(r">([^<>]+)</text>", figure[figure.index('<svg class="key"') :])


def test_a_router_whose_size_is_unknown_has_no_shares(write_run):
    folder = write_run()
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    records[0]["routers"] = {"ffn": {"groups": 1, "experts": 0, "choices": "2"}}
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert outline(folder).texts("none").count("The run did not record the router's size.") == 4


def test_scales_hold_their_values():
    values = np.array([0.0, 1e-9, 0.001, 0.0011, 0.5, 0.51, 1.0, np.nan])
    shades = Shades(0.0, 1.0, inner=(0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5), is_share=True)
    assert shades.of(values).tolist() == [0, 1, 1, 2, 7, 8, 8, -1]
    assert shades.labels == {
        0: "0", 2: ".1", 3: "1", 4: "2", 5: "5", 6: "10", 7: "25", 8: "50", 9: "100%",
    }  # fmt: skip
    assert Shades(0.0, 9.0).labels == {0: "0", 9: "9"}


def test_what_is_particular_to_a_router_is_drawn_if_it_varies(write_run):
    folder = write_run(steps=range(1, 5))
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    for record in records:
        if record["kind"] == "start":
            size = {"groups": 1, "experts": 8, "choices": 2}
            record["routers"] = {"ffn": size, "attention": size}
        if record["kind"] == "step":
            usual = {"drop_share": 0.03, "load_imbalance": 1.7, "dead_experts": 1.0, "entropy": 1.0}
            of_ffn = {
                "experts_per_token": 3.0 - record["step"] / 8,
                "sparsity_coefficient": 10.0 ** (record["step"] - 9),
            }
            record["routing"] = {
                "layer0.repeat0.ffn": usual | of_ffn,
                "layer0.repeat0.attention": usual | {"experts_per_token": 2.0},
            }
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    figures = routing_figures(read_run(folder))
    assert len(figures["ffn"]) == len(figures["attention"]) + 2
    experts, coefficient = figures["ffn"][4:6]
    assert "2.5" in experts
    assert "2.88" in experts
    shades = re.findall(r'<path class="(q\d)"', coefficient)
    assert len(set(shades)) == 4  # each step a color of its own, though they differ tenfold
