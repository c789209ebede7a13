"""What is recomputed is the cheapest that fits, of everything that can be."""

from dataclasses import replace
from functools import cache
from itertools import chain, combinations, product
from unittest.mock import patch

import pytest

from moa_dist.config import load_config
from moa_dist.config.parts import PARTS
from moa_dist.config.recompute import Recompute, recomputed_parts
from moa_dist.config.run import Config
from moa_dist.plan.cluster import GPUS, Cluster
from moa_dist.plan.layouts import Planned, Planner, with_layout
from moa_dist.plan.recomputation import Cost, choose, recompute_name, recompute_options
from moa_dist.plan.time import Assumptions
from tests.plan.test_cluster import CONFIGS

EVERYTHING = [*PARTS, "experts"]
SUBSETS = list(chain.from_iterable(combinations(EVERYTHING, n) for n in range(4)))
LAYOUT = {"expert_parallel": 2, "zero_stage": 2, "micro_batch": 8}


TOKENS = dict.fromkeys(PARTS, "tokens")


@cache
def planner() -> Planner:
    return Planner(load_config(CONFIGS / "244m.yaml"), Cluster(8, 8, GPUS["h100"]), Assumptions())


def layout(recompute: Recompute) -> Config:
    return with_layout(planner().config, **LAYOUT, recompute=recompute, exchange=TOKENS)


def planned(recompute: Recompute) -> Planned:
    return planner().plan(layout(recompute))


def fit(memory: int) -> Planned:
    """On GPUs of so many bytes; what was configured does not matter."""
    gpu = replace(GPUS["h100"], memory=memory)
    with patch.object(planner(), "cluster", replace(planner().cluster, gpu=gpu)):
        return planner().fit(layout(recompute=True))


def test_the_cheapest_subset_that_fits_is_chosen():
    """For every memory limit at which another one might be: just enough for one of them."""
    whole = planned(False)
    every = {recompute: planned(recompute) for recompute in [True, *SUBSETS]}
    assert every[()].memory == whole.memory
    chosen = set()
    for limit in sorted(each.memory.total for each in every.values()):
        found = fit(limit)
        fitting = [each.time.seconds for each in every.values() if each.memory.total <= limit]
        assert found.memory.total <= limit
        assert found.time.seconds == min(fitting)
        chosen.add(found.config.train.recompute)
    assert {False, ("attention",), True} < chosen


def test_nothing_fits_by_how_much():
    smallest = min(planned(recompute).memory.total for recompute in [True, *SUBSETS])
    found = fit(smallest - 3 * 2**30)
    assert not found.recomputation.fits
    assert found.memory.total == smallest
    assert "3.0 GiB too much" in str(found.recomputation)


@pytest.mark.parametrize("memory", range(10, 21))
def test_choices_equal_brute_force(memory):
    costs = [Cost(*cost) for cost in product((12, 15, 18), (1.0, 1.5, 2.0))]
    by_option = dict(zip([("experts",), ("ffn",), ("attention",), True], costs[::2], strict=False))
    by_option |= {False: Cost(20, 0.5)}
    choice = choose(list(by_option), by_option.__getitem__, memory)
    fitting = {o: c for o, c in by_option.items() if c.num_bytes <= memory}
    assert choice.fits == bool(fitting)
    if fitting:
        assert by_option[choice.recompute].seconds == min(c.seconds for c in fitting.values())
    else:
        assert by_option[choice.recompute].num_bytes == min(c.num_bytes for c in costs[::2])


def test_it_says_what_cheaper_ones_lack():
    costs = {False: Cost(8 * 2**30, 1.0), ("experts",): Cost(6 * 2**30, 1.1)}
    costs |= {("ffn",): Cost(5 * 2**30, 1.2), True: Cost(4 * 2**30, 1.3)}
    text = str(choose(list(costs), costs.__getitem__, 5 * 2**30))
    assert text.startswith("train.recompute=[ffn]: 3.0 GiB less for 200.0 ms a step (20.0%)")
    assert "false by 3.0 GiB, [experts] by 1.0 GiB" in text


@pytest.mark.parametrize("path", ["small/moa_moe.yaml", "small/moeut.yaml", "dense/44m.yaml"])
def test_options_are_what_differs(path):
    config = load_config(CONFIGS.parent / path)
    options = recompute_options(config)
    parts = [recomputed_parts(option) for option in options]
    assert len(set(parts)) == len(parts)
    has_experts = bool(config.model.routed_parts())
    assert any("experts" in each for each in parts) == has_experts
    for option in options:  # as a user would copy it
        override = f"train.recompute={recompute_name(option)}"
        assert load_config(CONFIGS.parent / path, [override]).train.recompute == option
    alone = ["train.compile=true", "parallel.expert_parallel=1"]
    compiled = load_config(CONFIGS.parent / path, alone)
    assert recompute_options(compiled) == [False]
