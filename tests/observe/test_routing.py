"""Routing summaries equal numbers computed by hand."""

import math

import pytest
import torch

from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.load_pictures import load_colors, load_pictures
from moa_dist.observe.routing import (
    dead_experts,
    overall_drop_share,
    router_call_name,
    router_call_of,
    routing_summary,
    worst_imbalance,
)
from tests.observe.reports import routing


def test_router_call_name():
    assert router_call_name(RouterCall(0, 1, "attention.value")) == "layer0.repeat1.attention.value"
    assert router_call_of("layer0.repeat1.attention.value") == RouterCall(0, 1, "attention.value")
    assert router_call_of("elsewhere") is None


def test_summary_over_router_groups():
    """Two heads: the second keeps to one expert of four."""
    report = RoutingReport(
        load=torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]]),
        dropped=torch.tensor([[0, 0, 0, 0], [4, 0, 0, 0]]),
        entropy=torch.tensor([8 * math.log(4) + 0.0, 16.0], dtype=torch.float64),
    )
    assert routing_summary(report) == {
        "drop_share": 0.25,
        "experts_per_token": 1.0,
        "entropy": pytest.approx(math.log(4) / 2),
        "load_imbalance": 4.0,
        "dead_experts": 3.0,
    }


def test_no_tokens_at_all():
    none = torch.zeros(1, 4, dtype=torch.int64)
    report = RoutingReport(none, none, torch.zeros(2, dtype=torch.float64))
    assert routing_summary(report) == {
        "drop_share": 0.0,
        "experts_per_token": 0.0,
        "entropy": 0.0,
        "load_imbalance": 0.0,
        "dead_experts": 4.0,
    }
    assert overall_drop_share({}) == 0.0


def test_dead_experts_are_those_that_no_repeat_uses():
    def load(*values):
        return RoutingReport(torch.tensor([values]), torch.zeros(1, 4), torch.zeros(2))

    calls = {
        RouterCall(0, 0, "ffn"): load(300, 20, 0, 0),
        RouterCall(0, 1, "ffn"): load(100, 0, 220, 0),
        RouterCall(1, 0, "ffn"): load(99, 99, 99, 0),
        RouterCall(1, 0, "attention"): load(4, 0, 0, 0),  # too little to judge
    }
    assert dead_experts(calls) == (2, 8)
    assert worst_imbalance(calls) == (pytest.approx(3.75), "layer0.repeat0.ffn")
    assert dead_experts({}) == (0, 0)
    assert worst_imbalance({}) == (0.0, "")


def test_picture_has_a_row_per_repeat_and_a_column_per_expert():
    """Loads 6 4 0 0 and 3 3 2 2 of a mean of 2.5; black is none, red twice the mean or more."""
    many, black = [178, 24, 43], [0, 0, 0]
    loads = list(routing().values())
    colors = [load_colors(report).tolist() for report in loads]
    assert colors[0][0] == many
    assert colors[0][2:] == [black, black]
    assert colors[1][0] == [233, 202, 206], "a fifth of the way from the mean to twice the mean"
    picture = load_pictures(routing())["ffn"]
    # A row and a column of pixels that cross the cells.
    cells = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {tuple(color) for row in colors for color in row} <= cells
    heights = [(picture == color).all(2).any(1).nonzero()[0] for color in colors[0]]
    assert heights[0].min() == heights[1].min(), "experts of a repeat share a row"


def test_pictures_of_many_layers_heads_and_experts():
    """Labels fit, and cells stay visible."""
    loads = torch.arange(4 * 250).reshape(4, 250)
    report = RoutingReport(loads, torch.zeros_like(loads), torch.zeros(2))
    picture = load_pictures({RouterCall(i, 0, "attention.value"): report for i in range(48)})
    assert picture["attention.value"].shape[1] > 4 * 250 * 3
