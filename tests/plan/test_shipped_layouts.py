"""Shipped configurations name their number of ranks and have the layout that is best on them."""

import pytest

from moa_dist.cli.plan_cluster import cluster_as_json
from moa_dist.config import find_layout_problems, load_config
from moa_dist.config.recipe import read_recipe, shipped_recipes
from moa_dist.plan.cluster import GPUS, Cluster
from moa_dist.plan.time import Assumptions

PATHS = shipped_recipes()
RANKS = {name: read_recipe(path).ranks for name, path in PATHS.items()}
FOR_GPUS = [name for name, path in PATHS.items() if load_config(path).train.precision == "bf16"]
DEFAULT = {"moeut/44m", "moeut/1b", "moeut/100b", "dense/1b", "jetmoe/8b", "translation/moa"}

TOLERANCE = 1.05
"""How much slower than the first a shipped layout may be: assumed efficiencies are less certain."""


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_starts_on_the_ranks_it_names(name):
    assert find_layout_problems(load_config(PATHS[name]), RANKS[name]) == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.full) for name in FOR_GPUS],
)
def test_the_planner_ranks_its_layout_first(name):
    config, ranks = load_config(PATHS[name]), RANKS[name]
    cluster = Cluster(ranks, min(8, ranks), GPUS["h100"])
    plan = cluster_as_json(config, cluster, Assumptions(), num_layouts=1)
    own, (first,) = plan["detailed"], plan["layouts"]
    assert own["title"] == "as configured"
    assert own["too_much"] is None
    assert own["seconds"] <= TOLERANCE * first["seconds"], f"{own['layout']} < {first['layout']}"


@pytest.mark.parametrize("ranks", [8, 64, 512])
@pytest.mark.parametrize("name", [name for name in FOR_GPUS if RANKS[name] >= 8])
def test_a_recipe_for_gpus_starts_on_any_number_that_its_batch_allows(name, ranks):
    """With a micro-batch of one sequence, on more ranks than it is for."""
    config = load_config(PATHS[name], ["train.micro_batch=1"])
    problems = find_layout_problems(config, ranks)
    keys = {key for problem in problems for key in problem.keys}
    if ranks % config.parallel.expert_parallel:
        assert "parallel.expert_parallel" in keys
    elif config.train.global_batch % ranks:
        assert "train.global_batch" in keys
    else:
        assert problems == []
