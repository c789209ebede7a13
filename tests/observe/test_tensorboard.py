"""TensorBoard reads back what was written, once per step also after a resume."""

import math
import re
from itertools import groupby
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from moa_dist.observe.load_pictures import load_pictures
from moa_dist.observe.tensorboard import TensorBoard
from moa_dist.peak_flops import peak_flops
from tests.observe.reports import (
    make_config,
    routing,
    sample_metrics,
    step_metrics,
    validation_metrics,
)


def record(run, *steps):
    board = TensorBoard()
    board.start(run)
    for step in steps:
        board.step(step_metrics(step, gpu={"memory_used_gib": 12.5}))
    board.validation(validation_metrics(steps[-1]))
    board.samples(sample_metrics(steps[-1]))
    board.note("not a curve")
    board.close()
    events = EventAccumulator(run.folder)
    events.Reload()
    return events


def values(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_curves_and_pictures(run_start):
    events = record(run_start(), 10, 20)
    loss = step_metrics(20).loss
    assert values(events, "loss/train")[-1] == (20, pytest.approx(loss))
    assert values(events, "perplexity/train")[-1] == (20, pytest.approx(math.exp(loss)))
    assert values(events, "optimizer/lr")[0] == (10, pytest.approx(0.3))
    assert values(events, "optimizer/grad_norm")[0] == (10, pytest.approx(0.41))
    assert values(events, "loss/train_aux/ffn/entropy")[0] == (10, pytest.approx(-0.03))
    assert values(events, "speed/tokens_per_second")[0] == (10, pytest.approx(12345.678))
    for name, value in {
        "drop_share": 0.3,
        "entropy": math.log(2),
        "load_imbalance": 2.4,
        "dead_experts": 2,
    }.items():
        tag = f"routing_layer0/ffn/{name}/repeat0"
        assert values(events, tag)[0] == (10, pytest.approx(value))
    assert values(events, "rank0_gpu/memory_used_gib") == [(10, 12.5), (20, 12.5)]
    assert values(events, "loss/validation_bits_per_byte") == [(20, pytest.approx(1.98))]
    assert values(events, "time/communication_share")[0] == (10, pytest.approx(1 / 3))
    assert values(events, "time/work_seconds_of_slowest_rank")[0] == (10, pytest.approx(0.5))
    assert values(events, "time/slowest_rank")[0] == (10, 0)
    (picture,) = events.Images("routing/load_ffn")
    drawn = load_pictures(routing())["ffn"]
    assert (picture.step, picture.height, picture.width) == (20, *drawn.shape[:2])
    (config,) = events.Tensors("config/text_summary")
    assert b"name: tiny" in config.tensor_proto.string_val[0]
    (sample,) = events.Tensors("samples/0/text_summary")
    assert sample.step == 20
    assert sample.tensor_proto.string_val[0].decode() == "    The ship\n    sails"


def test_losses_come_first_and_layers_are_groups(run_start):
    """TensorBoard sorts groups, and the tags of a group, by name."""
    tags = record(run_start(), 10).Tags()
    grouped = groupby(sorted(tags["scalars"] + tags["images"]), lambda tag: tag.split("/")[0])
    groups = {group: list(members) for group, members in grouped}
    assert list(groups)[:2] == ["loss", "optimizer"]
    assert groups["loss"] == [
        "loss/train",
        "loss/train_aux/attention/entropy",
        "loss/train_aux/ffn/entropy",
        "loss/validation",
        "loss/validation_bits_per_byte",
    ]
    assert groups["routing"] == ["routing/load_ffn"]
    assert len(groups["routing_layer0"]) == 2 * 5, "two repeats"


def test_a_run_is_shown_under_its_name(run_start):
    run = run_start()
    record(run, 10)
    runs = EventMultiplexer().AddRunsFromDirectory(str(Path(run.folder).parent))
    assert list(runs.Runs()) == ["tiny"]


def test_every_chart_of_the_layout_shows_something(run_start):
    """Read with TensorBoard's own parser; its charts take every tag that a pattern is found in."""
    data = {"train": "data", "valid": "data", "sequence_length": 64}
    events = record(run_start(config=make_config(data=data)), 10)
    (saved,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(saved.tensor_proto.string_val[0])
    charts = {(c.title, chart.title): chart for c in layout.category for chart in c.chart}
    shown = {
        name: [t for t in events.Tags()["scalars"] if any(re.search(p, t) for p in patterns)]
        for name, chart in charts.items()
        if (patterns := chart.multiline.tag)
    }
    assert set(shown) == set(charts)
    assert all(shown.values())
    assert shown["Learning", "loss"] == ["loss/train", "loss/validation"]
    assert shown["Router ffn, by layer and repeat", "drop share"] == [
        f"routing_layer0/ffn/drop_share/repeat{r}" for r in (0, 1)
    ]
    assert ("GPU of rank 0", "memory, GiB") in shown
    assert ("GPU of rank 0", "power, W") not in shown


def test_resuming_repeats_no_point(run_start):
    record(run_start(), 10, 20, 30)
    events = record(run_start(first_step=20), 30, 40)
    assert [step for step, _ in values(events, "loss/train")] == [10, 20, 30, 40]
    assert [image.step for image in events.Images("routing/load_ffn")] == [40]


def test_rewinding_hides_the_points_of_discarded_steps(run_start):
    run = run_start()
    board = TensorBoard()
    board.start(run)
    for step in (10, 20, 30):
        board.step(step_metrics(step))
    board.validation(validation_metrics(30))
    board.rewind(10)
    board.step(step_metrics(20, loss=9.0))
    board.close()
    events = EventAccumulator(run.folder)
    events.Reload()
    assert [step for step, _ in values(events, "loss/train")] == [10, 20]
    assert values(events, "loss/train")[-1] == (20, 9.0)
    assert values(events, "loss/validation") == []


def test_utilization_only_where_the_peak_is_known(run_start, tmp_path):
    events = record(run_start(), 10)
    flops = 12345.678 * 1.5e7
    assert values(events, "speed/flops_per_second") == [(10, pytest.approx(flops))]
    assert "speed/model_flops_utilization" not in events.Tags()["scalars"]

    device = "cuda (NVIDIA A100-SXM4-80GB)"
    events = record(run_start(device=device, folder=str(tmp_path / "gpu")), 10)
    share = flops / (2 * 19.5e12)
    assert values(events, "speed/model_flops_utilization") == [(10, pytest.approx(share))]


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("cuda (NVIDIA H100 80GB HBM3)", "bf16", 989e12),
        ("cuda (NVIDIA H100 PCIe)", "bf16", 756e12),
        ("cuda (NVIDIA H200)", "fp32", 67e12),
        ("cuda (NVIDIA H200)", "tf32", 494.5e12),
        ("cuda (NVIDIA H200)", "fp64", None),
        ("cuda (NVIDIA RTX A1000)", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_by_name(device, precision, peak):
    assert peak_flops(device, precision) == peak


def test_closing_before_the_start_does_nothing():
    TensorBoard().close()
