"""What Muon computes and exchanges, by hand; `tests/distributed/test_muon.py` asks real ranks."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moa_dist.config import load_config
from moa_dist.plan.cluster import GPUS, Cluster
from moa_dist.plan.layouts import Planner
from moa_dist.plan.orthogonalization import Matrices, orthogonalization
from moa_dist.plan.time import Assumptions, Span
from moa_dist.train.muon import orthogonalize

H100 = GPUS["h100"]
SQUARE, WIDE = Matrices(1, 4, 4), Matrices(1, 2, 8)


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 8, 24), (2, 24, 8)])
def test_flops_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(shape, device="meta"))
    assert counter.get_total_flops() == shape[0] * Matrices(*shape).flops


def test_flops_by_hand():
    """Per iteration X X^T and P X, 2 R R C each, and the square of X X^T, 2 R R R."""
    assert WIDE.flops == 5 * (2 * 2 * 2 * 8 + 2 * 2 * 2 * 8 + 2 * 2 * 2 * 2)


def test_without_zero_every_rank_updates_all():
    work = orthogonalization((Matrices(3, 4, 4), WIDE), zero_stage=0, num_ranks=4)
    assert work.busiest == Counter({SQUARE: 3, WIDE: 1})
    assert work.exchanges == []


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_one_rank_updates_all(zero_stage):
    work = orthogonalization((Matrices(3, 4, 4), WIDE), zero_stage, num_ranks=1)
    assert work.busiest == Counter({SQUARE: 3, WIDE: 1})
    assert work.exchanges == []


def test_borders_between_matrices_cost_no_exchange():
    work = orthogonalization((Matrices(6, 4, 4), Matrices(2, 4, 4)), zero_stage=1, num_ranks=4)
    assert work.busiest == Counter({SQUARE: 2})
    assert work.exchanges == []


def test_matrices_that_a_border_cuts_are_dealt_out():
    # 80 elements over 2 ranks: 2 squares and half of the third | half, 1 square, 1 wide.
    work = orthogonalization((Matrices(4, 4, 4), WIDE), zero_stage=2, num_ranks=2)
    assert work.busiest == Counter({SQUARE: 3})  # 2 whole ones, and the cut one falls to rank 0
    assert work.exchanges == [16]


def test_stage_3_cuts_every_tensor_by_itself():
    # 3 squares over 2 ranks: 1 and a half each; the wide one is cut, too.
    work = orthogonalization((Matrices(3, 4, 4), WIDE), zero_stage=3, num_ranks=2)
    assert work.exchanges == [16 + 16]
    assert work.busiest == Counter({SQUARE: 2})


def spans_of(*overrides: str) -> dict[str, Span]:
    """Parts of a step of 1B on 64 GPUs, experts over pairs of them."""
    file = Path(__file__).parents[2] / "configs" / "moeut" / "1b.yaml"
    layout = ["parallel.expert_parallel=2", "train.micro_batch=1"]
    layout += ["parallel.expert_exchange={attention: tokens, ffn: tokens}"]
    planner = Planner(load_config(file, [*layout, *overrides]), Cluster(64, 8, H100), Assumptions())
    return {span.name: span for span in planner.plan(planner.config).time.spans}


# 4 distinct layers: q and k; v and o of 6 heads x 12 experts, up and down of 565, on 2 ranks.
DENSE, EXPERT = Matrices(1, 768, 1536), Matrices(1, 128, 1536)
NUM_DENSE, NUM_EXPERT = 4 * 2, 4 * (2 * 36 + 2 * 283)
BYTES_PER_SECOND = 0.7 * H100.memory_bandwidth


def test_time_at_stage_0_by_hand():
    """Every rank updates all dense matrices and all experts that it holds."""
    spans = spans_of("optimizer.kind=muon", "parallel.zero_stage=0", "train.precision=tf32")
    flops = NUM_DENSE * DENSE.flops + NUM_EXPERT * EXPERT.flops
    assert spans["orthogonalization"].seconds == pytest.approx(flops / (0.5 * 989e12 / 2))
    num_bytes = NUM_DENSE * DENSE.num_bytes + NUM_EXPERT * EXPERT.num_bytes
    # And AdamW for the rest: above all embedding, head and routers.
    assert spans["update"].seconds == pytest.approx(num_bytes / BYTES_PER_SECOND, rel=0.02)
    assert not [name for name in spans if "matrices" in name]


def test_time_at_stage_1_by_hand():
    """A rank of 64 has an eighth of a dense matrix, and 1 / 32 of the experts of its pair."""
    spans = spans_of("optimizer.kind=muon", "parallel.zero_stage=1")
    per_rank, cut = divmod(NUM_EXPERT, 32)
    assert cut, "borders go through matrices"
    # 31 borders: at most one cut matrix falls to each rank, and one dense one to 8 of them.
    flops = DENSE.flops + per_rank * EXPERT.flops
    expected = pytest.approx(flops / (0.5 * 67e12), rel=1.1 / per_rank)
    assert spans["orthogonalization"].seconds == expected
    sent = 2 * 2 * 63 / 64 * NUM_DENSE * DENSE.size * 4
    expected = sent / (0.8 * 8 * H100.network_bandwidth) + 2 * 25e-6
    assert spans["dense matrices exchanged"].seconds == pytest.approx(expected)
    few = spans["expert matrices exchanged"]
    assert few.seconds < 2 * 2 * 31 * EXPERT.size * 4 / (0.8 * 4 * H100.network_bandwidth) + 60e-6


def test_stage_3_exchanges_most_matrices():
    spans = {
        stage: spans_of("optimizer.kind=muon", f"parallel.zero_stage={stage}") for stage in (2, 3)
    }
    seconds = {stage: found["expert matrices exchanged"].seconds for stage, found in spans.items()}
    assert seconds[3] > seconds[2]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_other_optimizers_have_no_matrices(kind):
    spans = spans_of(f"optimizer.kind={kind}", "parallel.zero_stage=1")
    assert "orthogonalization" not in spans
    assert not [name for name in spans if "matrices" in name]
