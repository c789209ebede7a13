"""Plots and headline numbers of counts made by hand."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from moa_dist.analyze.headline import headline
from moa_dist.analyze.panels import MOST_PAIRED, plates
from moa_dist.analyze.plots import write_plots
from moa_dist.analyze.results import (
    Analysis,
    HeadResult,
    LayerHeads,
    RouterResult,
    TokenOfExpert,
    load_analysis,
    save_analysis,
)
from moa_dist.analyze.summary import router_lines, summary
from moa_dist.report.analysis import analysis_page

# 10 tokens choose 2 of 4 experts in each of 2 repeats: repeat 0 takes 0 and 1 always; repeat 1
# takes 1 always, and 2 for its second. Expert 3 is never chosen.
ROUTER = RouterResult(
    layer=0,
    router="ffn",
    num_groups=1,
    choices=2,
    num_tokens=10,
    load=[[10, 10, 0, 0], [0, 10, 10, 0]],
    dropped=[[0, 0, 0, 0], [0, 3, 1, 0]],
    together=[[10, 10, 0, 0], [10, 20, 10, 0], [0, 10, 10, 0], [0, 0, 0, 0]],
    common=[[20, 10], [10, 20]],
    distinct=[0, 0, 0, 10, 0],
    num_frequent=3,
    information=0.1,
    most_information=0.4,
    top_tokens=[
        [TokenOfExpert(token=5, text=" <b>\n", pmi=1.5, share=0.5, count=4)],
        *([] for _ in range(3)),
    ],
)


def head(queries, distance):
    return HeadResult(
        queries=queries, distance=distance, entropy=1.0, previous=0.2, first=0.1, itself=0.3
    )


def analysis(*routers):
    return Analysis(
        name="planted",
        step=3,
        data="data/valid",
        tokens=10,
        sequence_length=5,
        min_count=2,
        routers=list(routers),
        attention=[
            LayerHeads(
                layer=0,
                repeat=repeat,
                attention="attention",
                heads=[head(8, 2.0 + repeat), head(0, 0.0)],
            )
            for repeat in range(2)
        ],
    )


def test_headline():
    numbers = headline(ROUTER)
    assert numbers.imbalance == 2
    assert numbers.dead == 1
    assert numbers.dropped == pytest.approx(4 / 40)
    assert numbers.explained == pytest.approx(0.25)
    depth = numbers.depth
    assert depth.overlap == 0.5
    assert depth.chance == 0.5
    assert depth.single_repeat == pytest.approx(2 / 3), "experts 0 and 2 of the three in use"
    assert depth.distinct == 3
    assert depth.most_distinct == 4


def test_panels():
    made = {plate.name: plate.panels for plate in plates(analysis(ROUTER))}
    assert list(made) == ["load", "depth", "overlap", "together", "heads"]
    assert made["load"][0].values_RC.tolist() == [[2, 2, 0, 0], [0, 2, 2, 0]]
    assert made["load"][0].rows == ["L0 R0", "L0 R1"]
    assert made["load"][0].columns == ["0", "1", "2", "3"]
    depth = made["depth"][0].values_RC
    assert made["depth"][0].columns == ["0", "1", "2", "3"], "by mean repeat, the unused one last"
    assert depth[:, :3].tolist() == [[1, 0.5, 0], [0, 0.5, 1]]
    assert np.isnan(depth[:, 3]).all()
    assert made["overlap"][0].values_RC.tolist() == [[1, 0.5], [0.5, 1]]
    together = made["together"][0]
    assert together.rows == together.columns == ["0", "1", "2", "3"]
    # Of 20 decisions, 10 take expert 0, all take expert 1: no news of each other.
    assert together.values_RC[0, 1] == pytest.approx(math.log((10 / 20) / (10 / 20)))
    assert together.values_RC[0, 2] == -math.inf
    assert np.isnan(together.values_RC[3]).all()
    assert np.isnan(np.diagonal(together.values_RC)).all()
    distance = made["heads"][0]
    assert distance.rows == ["L0 R0", "L0 R1"]
    assert distance.values_RC[:, 0].tolist() == [2, 3]
    assert np.isnan(distance.values_RC[:, 1]).all(), "a head without a query"
    assert (distance.low, distance.high) == (2, 3)
    shares = [panel for panel in made["heads"] if panel.quantity == "share of attention"]
    assert [(panel.low, panel.high) for panel in shares] == [(0, 0.3)] * 3, "one scale for all"


def test_rows_of_heads_and_loads_have_one_order():
    """By layer, then repeat, although repeats of all layers take turns when the model runs."""
    heads = [
        LayerHeads(layer=layer, repeat=repeat, attention="attention", heads=[head(1, 10 * layer)])
        for repeat in range(2)
        for layer in range(2)
    ]
    routers = ROUTER, ROUTER.model_copy(update={"layer": 1})
    both = analysis(*routers).model_copy(update={"attention": heads})
    made = {plate.name: plate.panels for plate in plates(both)}
    assert made["load"][0].rows == ["L0 R0", "L0 R1", "L1 R0", "L1 R1"]
    assert made["heads"][0].rows == made["load"][0].rows
    assert made["heads"][0].values_RC[:, 0].tolist() == [0, 0, 10, 10]


def test_every_picture_has_named_axes_and_color_bars(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    write_plots(analysis(ROUTER), tmp_path)
    made = plates(analysis(ROUTER))
    assert len(drawn) == len(made)
    for figure, plate in zip(drawn, made, strict=True):
        shown = [axes for axes in figure.axes if axes.get_images()]
        bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
        assert len(shown) == len(bars) == len(plate.panels)
        for axes, bar, panel in zip(shown, bars, plate.panels, strict=True):
            assert (axes.get_ylabel(), axes.get_xlabel()) == panel.axes
            assert bar.get_ylabel() == panel.quantity
            assert [label.get_text() for label in axes.get_yticklabels()] == panel.rows
            assert [label.get_text() for label in axes.get_xticklabels()] == panel.columns
            known = panel.values_RC[np.isfinite(panel.values_RC)]
            assert [float(text.get_text()) for text in axes.texts] == pytest.approx(
                known.ravel().tolist(), abs=0.01
            )


def test_long_axes_are_labeled_at_intervals(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    many = {
        "load": [[1] * 100],
        "dropped": [[0] * 100],
        "together": np.eye(100, dtype=int).tolist(),
    }
    more = {"common": [[20]], "top_tokens": [[]] * 100}
    write_plots(analysis(ROUTER.model_copy(update=many | more)), tmp_path)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(
        map(str, range(0, 100, 5))
    )
    assert not axes.texts, "100 values do not fit"


def test_pairs_of_the_most_used_experts_only():
    num_experts = MOST_PAIRED + 4
    load = [list(range(num_experts))]
    many = ROUTER.model_copy(
        update={
            "load": load,
            "dropped": load,
            "together": np.diag(load[0]).tolist(),
            "common": [[20]],
            "top_tokens": [[]] * num_experts,
        }
    )
    (together,) = [
        p for plate in plates(analysis(many)) if plate.name == "together" for p in plate.panels
    ]
    assert together.rows == [str(expert) for expert in range(4, num_experts)]


def test_page_and_text():
    page = analysis_page(analysis(ROUTER))
    assert "<b>\n" not in page, "text of a token became markup"
    assert "␣&lt;b&gt;⏎" in page
    text = summary(analysis(ROUTER))
    assert "␣<b>⏎" in text
    (nearest,) = [line for line in text.splitlines() if "L0 R0 head 0" in line and "2.0" in line]
    assert "tokens" in nearest
    load, explained, overlap, single = router_lines(ROUTER)
    assert all(number in load for number in ("4", "2.00", "1", "10.0%"))
    assert all(number in explained for number in ("25.0%", "3"))
    assert overlap.count("50.0%") == 2
    assert all(number in single for number in ("66.7%", "3.0", "4"))


def test_file(tmp_path):
    assert load_analysis(tmp_path) is None
    save_analysis(analysis(ROUTER), tmp_path)
    assert load_analysis(tmp_path) == analysis(ROUTER)
