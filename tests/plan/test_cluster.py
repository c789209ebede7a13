"""Links, times and layouts, by hand."""

from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.plan.cluster import GPUS, Cluster, NetworkLink
from moa_dist.plan.exchange_choice import PARTS
from moa_dist.plan.layouts import Planner, with_layout
from moa_dist.plan.terms import total
from moa_dist.plan.time import Assumptions

CONFIGS = Path(__file__).parents[2] / "configs" / "moeut"
H100 = GPUS["h100"]
LINK, NETWORK = H100.link_bandwidth, H100.network_bandwidth


def cluster(num_gpus: int) -> Cluster:
    return Cluster(num_gpus, 8, H100)


def planner(name: str, num_gpus: int, *overrides: str) -> Planner:
    return Planner(load_config(CONFIGS / name, overrides), cluster(num_gpus), Assumptions())


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth"),
    [
        (8, 1, LINK),  # one node
        (64, 1, 8 * NETWORK),  # rings through all 8 adapters
        (8, 8, NETWORK),  # one GPU of each node
        (16, 4, 2 * NETWORK),
        (4, 2, LINK),
    ],
)
def test_rings_use_all_adapters_of_their_group(size, stride, bandwidth):
    assert cluster(64).ring(size, stride).bandwidth == min(bandwidth, LINK)


def test_most_of_an_all_to_all_leaves_the_node():
    assert cluster(64).all_to_all(8) == NetworkLink(LINK, 10e-6)
    # To 8 of 15 others by the adapter; the 7 in the node are done by then.
    assert cluster(64).all_to_all(16).bandwidth == pytest.approx(NETWORK * 15 / 8)


def test_time_by_hand():
    """1B on 64 GPUs, ep 2: 1 sequence a rank, nothing recomputed."""
    planned = planner("1b.yaml", 64)
    exchange = dict.fromkeys(PARTS, "weights")
    result = planned.plan(with_layout(planned.config, 2, 1, 1, False, exchange))
    spans = {span.name: span for span in result.time.spans}
    macs = planned.counts.training.total_macs
    assert spans["products"].seconds == pytest.approx(6 * macs / (0.5 * 989e12))
    # 4 layers, one gather forward and one scatter back, of half of all experts.
    sent = planned.counts.experts / 2 * 2 * 2
    messages = 4 * 4 * 2
    expected = sent / (0.8 * LINK) + messages * 10e-6
    assert spans["weights gathered"].seconds == pytest.approx(expected, rel=5e-3)
    # Ranks two apart: 4 of each node among 32, fp32, out and back.
    sent = 2 * 31 / 32 * planned.counts.experts / 2 * 4
    expected = sent / (0.8 * 4 * NETWORK)
    assert spans["expert gradients"].seconds == pytest.approx(expected, rel=0.05)
    time = result.time
    assert time.seconds == pytest.approx(sum(span.exposed for span in spans.values()))
    assert time.mfu == pytest.approx(6 * macs / time.seconds / 989e12)
    assert time.tokens_per_second == pytest.approx(64 * 1024 / time.seconds)


def test_layouts_are_ranked_and_those_that_do_not_fit_have_a_reason():
    fitting, reasons = planner("100b.yaml", 1024).ranked()
    assert fitting
    times = [planned.time.seconds for planned in fitting]
    assert times == sorted(times)
    assert all(planned.memory.total <= H100.memory for planned in fitting)
    assert any(
        r.startswith("ep 1, ZeRO 2, ") and "are gathered, for a GPU of 74.5 GiB" in r
        for r in reasons
    )


def test_memory_adds_up():
    plan = planner("100b.yaml", 1024)
    memory = plan.plan(plan.config).memory
    parts = {name: total(lines) for name, lines in memory.parts().items()}
    passing = parts.pop("updating")
    assert passing < memory.computing
    assert memory.total == sum(parts.values()) + memory.margin


def test_recomputation_saves_memory_and_costs_time():
    plan = planner("1b.yaml", 64)
    exchange = dict.fromkeys(PARTS, "tokens")
    plain, again = (
        plan.plan(with_layout(plan.config, 8, 2, 2, recompute, exchange))
        for recompute in (False, True)
    )
    assert again.memory.total < plain.memory.total / 2
    assert again.time.seconds > plain.time.seconds
    assert again.time.model_flops == plain.time.model_flops
