"""Routing summaries equal numbers computed by hand."""

import math

import numpy as np
import pytest
import torch

from moa_dist.models.stack import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.routing import (
    load_heatmaps,
    overall_drop_share,
    router_call_name,
    router_call_of,
    routing_summary,
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
        "entropy": pytest.approx(math.log(4) / 2),
        "load_imbalance": 4.0,
        "dead_experts": 3.0,
    }


def test_no_tokens_at_all():
    none = torch.zeros(1, 4, dtype=torch.int64)
    report = RoutingReport(none, none, torch.zeros(2, dtype=torch.float64))
    assert routing_summary(report) == {
        "drop_share": 0.0,
        "entropy": 0.0,
        "load_imbalance": 0.0,
        "dead_experts": 4.0,
    }
    assert overall_drop_share({}) == 0.0


def test_heatmap_has_a_row_per_repeat_and_a_column_per_expert():
    picture = load_heatmaps(routing())["ffn"]
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    cells = picture[::height, ::width]
    # Loads 6 4 0 0 and 3 3 2 2 of a mean of 2.5; twice the mean is white.
    assert cells.tolist() == [[255, 204, 0, 0], [153, 153, 102, 102]]
    assert np.array_equal(picture, cells.repeat(height, axis=0).repeat(width, axis=1))
