"""TensorBoard reads back what was written, once per step also after a resume."""

import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from moa_dist.observe.tensorboard import FOLDER_NAME, TensorBoard
from moa_dist.peak_flops import peak_flops
from tests.observe.reports import make_config, step_metrics, validation_metrics


def record(run, *steps):
    board = TensorBoard()
    board.start(run)
    for step in steps:
        board.step(step_metrics(step, gpu={"memory_used_gib": 12.5}))
    board.validation(validation_metrics(steps[-1]))
    board.note("not a curve")
    board.close()
    events = EventAccumulator(str(Path(run.folder) / FOLDER_NAME))
    events.Reload()
    return events


def values(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_curves_and_pictures(run_start):
    events = record(run_start(), 10, 20)
    loss = step_metrics(20).loss
    assert values(events, "train/loss")[-1] == (20, pytest.approx(loss))
    assert values(events, "train/perplexity")[-1] == (20, pytest.approx(math.exp(loss)))
    assert values(events, "train/lr")[0] == (10, pytest.approx(0.3))
    assert values(events, "train/grad_norm")[0] == (10, pytest.approx(0.41))
    assert values(events, "aux_losses/ffn/entropy")[0] == (10, pytest.approx(-0.03))
    assert values(events, "speed/tokens_per_second")[0] == (10, pytest.approx(12345.678))
    for name, value in {
        "drop_share": 0.3,
        "entropy": math.log(2),
        "load_imbalance": 2.4,
        "dead_experts": 2,
    }.items():
        tag = f"routing/layer0.repeat0.ffn/{name}"
        assert values(events, tag)[0] == (10, pytest.approx(value))
    assert values(events, "gpu/memory_used_gib") == [(10, 12.5), (20, 12.5)]
    assert values(events, "validation/bits_per_byte") == [(20, pytest.approx(1.98))]
    assert values(events, "time/communication_share")[0] == (10, pytest.approx(1 / 3))
    assert values(events, "time/work_seconds_of_slowest_rank")[0] == (10, pytest.approx(0.5))
    assert values(events, "time/slowest_rank")[0] == (10, 0)
    (picture,) = events.Images("load/ffn")
    assert (picture.step, picture.height, picture.width) == (20, 2 * 8, 4 * 4)
    (config,) = events.Tensors("config/text_summary")
    assert b"name: tiny" in config.tensor_proto.string_val[0]


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
    assert shown["Learning", "loss"] == ["train/loss", "validation/loss"]
    assert shown["Router ffn, by layer and repeat", "drop share"] == [
        f"routing/layer0.repeat{r}.ffn/drop_share" for r in (0, 1)
    ]
    assert ("GPU of rank 0", "memory, GiB") in shown
    assert ("GPU of rank 0", "power, W") not in shown


def test_resuming_repeats_no_point(run_start):
    record(run_start(), 10, 20, 30)
    events = record(run_start(first_step=20), 30, 40)
    assert [step for step, _ in values(events, "train/loss")] == [10, 20, 30, 40]
    assert [image.step for image in events.Images("load/ffn")] == [40]


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
    events = EventAccumulator(str(Path(run.folder) / FOLDER_NAME))
    events.Reload()
    assert [step for step, _ in values(events, "train/loss")] == [10, 20]
    assert values(events, "train/loss")[-1] == (20, 9.0)
    assert values(events, "validation/loss") == []


def test_utilization_only_where_the_peak_is_known(run_start):
    events = record(run_start(), 10)
    flops = 12345.678 * 1.5e7
    assert values(events, "speed/flops_per_second") == [(10, pytest.approx(flops))]
    assert "speed/model_flops_utilization" not in events.Tags()["scalars"]

    events = record(run_start(device="cuda (NVIDIA A100-SXM4-80GB)"), 10)
    share = flops / (2 * 19.5e12)
    assert values(events, "speed/model_flops_utilization") == [(10, pytest.approx(share))]


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("cuda (NVIDIA H100 80GB HBM3)", "bf16", 989e12),
        ("cuda (NVIDIA H100 PCIe)", "bf16", 756e12),
        ("cuda (NVIDIA H200)", "fp32", 67e12),
        ("cuda (NVIDIA H200)", "fp64", None),
        ("cuda (NVIDIA RTX A1000)", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_by_name(device, precision, peak):
    assert peak_flops(device, precision) == peak


def test_closing_before_the_start_does_nothing():
    TensorBoard().close()
