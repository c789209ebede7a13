"""A person learns from the console what was chosen and why, how far it is, and how long to go."""

import io
import re

import pytest

from moa_dist.observe.console import Console
from moa_dist.observe.metrics import Timing
from moa_dist.observe.units import duration, short
from tests.observe.reports import make_config, step_metrics, validation_metrics


def start(run, clock=lambda: 0.0):
    stream = io.StringIO()
    console = Console(stream, clock)
    console.start(run)
    return console, stream


def last_line(stream):
    return stream.getvalue().splitlines()[-1]


def test_start_says_what_follows_from_what(run_start):
    _, stream = start(run_start())
    text = stream.getvalue()
    assert "cpu: no CUDA device found, so gloo; fp32 by train.precision" in text
    assert "W 2 = ep 2 x edp 1, ZeRO 2: attention and FFN experts sharded over 2 ranks\n" in text
    assert "gradients partitioned: dense over 2 ranks, experts over 1" in text
    assert "32 sequences a step = 2 ranks x 8 per micro-batch x 2 accumulated" in text
    assert "4.02M parameters, 1.31M active per token" in text
    assert "runs/tiny" in text
    assert "from the beginning" in text


def test_start_of_other_layouts(run_start):
    _, stream = start(run_start(world_size=4))
    assert "ep 2 x edp 2" in stream.getvalue()
    assert "2 copies of each shard" in stream.getvalue()

    config = make_config("dense", parallel={"expert_parallel": 1, "zero_stage": 0})
    _, stream = start(run_start(config=config, first_step=120))
    assert "W 2 = ep 1 x edp 2, ZeRO 0: FFN experts whole on every rank" in stream.getvalue()
    assert "nothing partitioned" in stream.getvalue()
    assert "resumed after step 120" in stream.getvalue()


def test_step_line(run_start):
    now = [100.0]
    console, stream = start(run_start(), clock=lambda: now[0])
    now[0] += 120.0
    console.step(step_metrics(120))
    assert last_line(stream) == (
        "step 120/650   18%  loss  5.003  aux -0.031  lr 3.0e-01  norm  0.41  12.3k tok/s"
        "  comm 33%  drop 15.0%  ETA 8m50s  rank 0 (node-1) works 1.7 x rank 1's time"
    )


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


def test_only_a_straggler_is_worth_a_word(run_start):
    console, stream = start(run_start())
    console.step(step_metrics(1, timing=Timing.of([0.5, 0.45], [0.0, 0.05], ["a", "b"])))
    assert last_line(stream).endswith("s")
    assert "works" not in last_line(stream)
    assert "comm  5%" in last_line(stream)
    console, stream = start(run_start(world_size=1))
    console.step(step_metrics(1, timing=Timing.of([0.5], [0.0], ["a"])))
    assert "comm" not in last_line(stream)


def test_dense_models_have_no_routing_fields(run_start):
    console, stream = start(run_start())
    console.step(step_metrics(1, routing={}, aux_losses={}))
    assert "drop" not in last_line(stream)
    assert "aux" not in last_line(stream)


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
