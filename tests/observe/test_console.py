"""The console shows what was chosen and why, how far training is, and how long it will take."""

import io
import re

import pytest
import torch

from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.console import Console
from moa_dist.observe.metrics import Timing
from moa_dist.units import duration, short
from tests.observe.reports import make_config, step_metrics, validation_metrics


def start(run, clock=lambda: 0.0):
    stream = io.StringIO()
    console = Console(stream, clock)
    console.start(run)
    return console, stream


def last_line(stream):
    return stream.getvalue().splitlines()[-1]


def rows(run) -> dict[str, str]:
    """The start-up block by name; lines without a name continue the row above."""
    _, stream = start(run)
    found: dict[str, str] = {}
    name = ""
    for line in stream.getvalue().splitlines():
        name = line[:10].strip() or name
        found[name] = f"{found.get(name, '')} {line[10:]}".strip()
    return found


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b", text)]


def test_start_shows_each_choice_with_its_reason(run_start):
    found = rows(run_start())
    for word in ("cpu", "CUDA", "gloo", "fp32", "train.precision"):
        assert word in found["device"]
    assert found["layout"].startswith("W 2 = ep 2 x edp 1, ZeRO 2: ")
    assert "attention and FFN" in found["layout"]
    sharded_over, dense_over, experts_over = 2, 2, 1
    assert numbers(found["layout"]) == [2, 2, 1, 2, sharded_over, dense_over, experts_over]
    assert numbers(found["batch"]) == [32, 2, 8, 2, 64]  # total = ranks x micro x accumulated; L
    assert "4.02M" in found["model"]
    assert "1.31M" in found["model"]
    assert "runs/tiny" in found["run"]
    assert found["steps"].startswith("650 ")


def test_start_of_other_layouts(run_start):
    found = rows(run_start(world_size=4))
    copies, sharded_over, dense_over, experts_over = 2, 2, 4, 2
    assert found["layout"].startswith("W 4 = ep 2 x edp 2, ZeRO 2: ")
    shown = [sharded_over, copies, dense_over, experts_over]
    assert numbers(found["layout"]) == [4, 2, 2, 2, *shown]

    config = make_config("dense", parallel={"expert_parallel": 1, "zero_stage": 0})
    found = rows(run_start(config=config, first_step=120))
    assert found["layout"].startswith("W 2 = ep 1 x edp 2, ZeRO 0: ")
    assert numbers(found["layout"]) == [2, 1, 2, 0]
    assert "FFN" in found["layout"]
    assert "attention" not in found["layout"]
    assert re.search(r"^650 .*\b120$", found["steps"])


def test_tokens_count_the_batches_that_were_really_read(run_start):
    """600 steps of 16 sequences of 64 tokens, and then 50 of 32."""
    found = rows(run_start(first_step=600, first_sample=600 * 16))
    assert f"({short((600 * 16 + 50 * 32) * 64)} tokens)" in found["steps"]


def test_step_line(run_start):
    now = [100.0]
    console, stream = start(run_start(), clock=lambda: now[0])
    now[0] += 120.0
    console.step(step_metrics(120))
    assert last_line(stream) == (
        "step 120/650   18%  loss  5.003  balance -0.031 (negative entropy)  lr 3.0e-01"
        "  grad norm  0.41, clipped to 0.25  12.3k tok/s  comm 33%  drop 15.0%"
        "  elapsed 2m00s  ETA 8m50s  straggler: rank 0 (node-1), 1.7 x rank 1"
    )


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ({"ffn/switch": 0.02}, "balance  0.020  lr"),
        ({"ffn/entropy": -0.03, "ffn/z_loss": 0.01}, "balance -0.020  lr"),
        ({"ffn/switch": 0.02, "logits/z_loss": 0.5}, "balance  0.020  lr"),
        ({"ffn/mutual_information": -0.5}, "balance -0.500 (negative mutual information)  lr"),
    ],
)
def test_a_balance_loss_is_named_if_it_is_the_only_one_and_negative(run_start, losses, shown):
    console, stream = start(run_start())
    console.step(step_metrics(1, aux_losses=losses))
    assert shown in last_line(stream)


@pytest.mark.parametrize(
    ("clip_norm", "norm", "shown"),
    [
        (0.25, 0.46, "grad norm  0.46, clipped to 0.25  12.3k"),
        (0.25, 0.25, "grad norm  0.25                   12.3k"),
        (None, 0.46, "grad norm  0.46  12.3k"),
    ],
)
def test_clipping_is_shown_where_it_happened(run_start, clip_norm, norm, shown):
    console, stream = start(run_start(config=make_config(optimizer={"clip_norm": clip_norm})))
    console.step(step_metrics(1, grad_norm=norm))
    assert shown in last_line(stream)


def test_steps_align_and_end_at_100_percent(run_start):
    console, stream = start(run_start())
    for step in (1, 99, 649, 650):
        console.step(step_metrics(step))
    lines = stream.getvalue().splitlines()[-4:]
    assert len({line.index("ETA") for line in lines}) == 1
    assert [re.search(r"(\d+)%", line)[1] for line in lines] == ["0", "15", "99", "100"]
    assert "ETA 0s " in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_eta_of_a_resumed_run_counts_its_own_steps(run_start):
    now = [0.0]
    console, stream = start(run_start(first_step=600), clock=lambda: now[0])
    now[0] = 10.0
    console.step(step_metrics(610))
    assert "ETA 40s " in last_line(stream)


def test_only_a_straggler_is_named(run_start):
    console, stream = start(run_start())
    console.step(step_metrics(1, timing=Timing.of([0.5, 0.45], [0.0, 0.05], ["a", "b"])))
    assert last_line(stream).endswith("s")
    assert "straggler" not in last_line(stream)
    assert "comm  5%" in last_line(stream)
    console, stream = start(run_start(world_size=1))
    console.step(step_metrics(1, timing=Timing.of([0.5], [0.0], ["a"])))
    assert "comm" not in last_line(stream)


@pytest.mark.parametrize(
    ("loads", "shown"),
    [
        ([[100, 100, 100, 100], [100, 100, 100, 100]], ""),
        ([[200, 200, 0, 0], [0, 0, 200, 200]], ""),
        ([[200, 200, 0, 0], [0, 200, 200, 0]], "  dead experts 1 of 4"),
        ([[10, 10, 0, 0], [10, 10, 0, 0]], ""),
        ([[100, 100, 100, 100], [320, 40, 20, 20]], ""),
        (
            [[900, 10, 10, 10, 10], [9, 9, 9, 9, 9]],
            "  fullest expert 4.8 x mean (layer0.repeat0.ffn)",
        ),
    ],
    ids=["even", "each repeat its own", "dead", "too few tokens", "uneven", "imbalanced"],
)
def test_problems_of_routing_are_shown_where_they_matter(run_start, loads, shown):
    routing = {
        RouterCall(0, i, "ffn"): RoutingReport(
            torch.tensor([load]), torch.zeros(1, len(load)), torch.zeros(2)
        )
        for i, load in enumerate(loads)
    }
    console, stream = start(run_start())
    even = Timing.of([0.5, 0.5], [0.1, 0.1], ["a", "b"])
    console.step(step_metrics(650, routing=routing, timing=even))
    assert last_line(stream).partition("ETA 0s")[2] == shown


def test_dense_models_have_no_routing_fields(run_start):
    console, stream = start(run_start())
    console.step(step_metrics(1, routing={}, aux_losses={}))
    assert "drop" not in last_line(stream)
    assert "balance" not in last_line(stream)


def test_validation_and_notes(run_start):
    console, stream = start(run_start())
    console.validation(validation_metrics(250))
    assert re.fullmatch(
        r"valid 250/650 +loss  4\.500  perplexity 90\.02  1\.980 bits per byte  over 65\.5k tokens",
        last_line(stream),
    )
    console.note("saved step-250")
    console.close()
    assert last_line(stream) == "saved step-250"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (999600, "1.00M"),
        (2e15, "2000T"),
    ],
)
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (252, "4m12s"), (7500, "2h05m"), (270000, "3d03h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
