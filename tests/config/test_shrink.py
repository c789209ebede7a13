"""The small copy that `moa-dist verify` runs: other sizes, the same choices."""

from typing import Any

import pytest

from moa_dist.config import find_layout_problems, load_config
from moa_dist.config.run import Config
from moa_dist.config.shrink import shrink
from moa_dist.models.counts import count
from tests.config.test_shipped_configs import CONFIGS, NAMES, SHIPPED

SIZES = {
    "model.vocab_size",
    "model.d_model",
    "model.num_layers",
    "model.num_distinct_layers",
    "model.prelude",
    "model.coda",
    "model.prelude_ffn.d_ff",
    "model.recursion.capacity",
    *(
        f"model.{part}.{size}"
        for part in ("attention", "ffn")
        for size in (
            *("num_heads", "heads_per_expert", "d_head", "d_ff", "d_expert"),
            *("router.num_experts", "router.top_k", "router.d_hidden", "router.d_state"),
            *("window.size", "window.full_every", "shared_experts", "shared_expert.d_expert"),
        )
    ),
    "data.sequence_length",
    "train.global_batch",
    "train.micro_batch",
}


def leaves(data: dict[str, Any], path: str = "") -> dict[str, Any]:
    result = {}
    for key, value in data.items():
        inner = isinstance(value, dict)
        result |= leaves(value, f"{path}{key}.") if inner else {path + key: value}
    return result


def check_choices(config: Config, world_size: int) -> Config:
    """The copy keeps all choices, and the cases that sharding meets; returns it."""
    small = shrink(config, world_size)
    before, after = leaves(config.model_dump()), leaves(small.model_dump())
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path] != after[path]}
    dropout = {f"model.{p}.router.expert_dropout" for p in ("attention", "ffn")} | {"model.dropout"}
    assert changed <= SIZES | dropout
    assert all(before[path] is not None for path in changed)
    assert find_layout_problems(small, world_size) == find_layout_problems(config, world_size)

    ep = config.parallel.expert_parallel
    for part in ("attention", "ffn"):
        theirs, ours = getattr(config.model, part), getattr(small.model, part)
        if not theirs.routers:
            continue
        flat, small_flat = (
            section.router.num_experts * getattr(section, "num_heads", 1)
            for section in (theirs, ours)
        )
        assert small_flat % ep == flat % ep, "shards as unequal as before"
        assert ep <= small_flat <= flat
        for relation in (
            lambda router: router.top_k == 1,
            lambda router: router.top_k == router.num_experts,
        ):
            assert relation(theirs.router) == relation(ours.router)
    for config_of in (
        lambda c: c.model.num_distinct_layers in (None, c.model.num_layers),  # no layer is shared
        lambda c: c.model.num_layers == 1,
        lambda c: c.train.global_batch > world_size * c.train.micro_batch,  # accumulates
        lambda c: c.model.d_model % 8,
    ):
        assert config_of(config) == config_of(small)
    return small


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_config_stays_itself_in_small(path, world_size):
    config = load_config(path)
    ep = min(config.parallel.expert_parallel, world_size)
    batch = max(config.train.global_batch, config.train.micro_batch * world_size)
    layout = [f"parallel.expert_parallel={ep}", f"train.global_batch={batch}"]
    small = check_choices(load_config(path, layout), world_size)
    sizes = small.train.global_batch, small.data.sequence_length, small.model.num_layers
    assert sizes <= (8 * world_size, 16, 4)
    assert count(small.model, small.data.sequence_length).total < 200_000


UNUSUAL = {
    "groups of experts": [
        "model.ffn.router={num_experts: 256, top_k: 8, score: sigmoid}",
        "model.ffn.router.group_limit={num_groups: 64, top_groups: 2}",
        "model.ffn.shared_expert={d_expert: 100}",
        "parallel.expert_parallel=24",
        "train.micro_batch=4",
        "train.global_batch=192",
    ],
    "windows": [
        "model.attention.window={size: 512, full_every: 3, rope: {fraction: 0.25}}",
        "model.attention.rope.scaling={kind: yarn, factor: 4, original_length: 2048}",
        "model.attention.shared_experts=true",
    ],
    "many heads of one expert each": [
        "model.attention.num_heads=16",
        "model.attention.router={num_experts: 1, top_k: 1, score: sigmoid}",
        "parallel.expert_parallel=12",
        "train.global_batch=96",
    ],
    "one head of many experts": [
        "model.attention.num_heads=1",
        "model.attention.router.num_experts=100",
        "parallel.expert_parallel=64",
        "train.global_batch=512",
    ],
    "barely more experts than chosen": ["model.ffn.router.num_experts=17"],
    "groups of sequences": [
        "model.attention.router.group_sequences=2",
        "model.ffn.router.group_sequences=4",
        "model.ffn.router.expert_dropout=0.1",
        "model.ffn.router.capacity={factor: 1.0, policy: probability}",
    ],
    "few rotated dimensions": ["model.attention.rope.fraction=0.02"],
    "smaller than the copy": [
        "model.d_model=5",
        "model.vocab_size=3",
        "data.sequence_length=1",
        "train.micro_batch=1",
    ],
}


@pytest.mark.parametrize("overrides", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_config_stays_itself_in_small(overrides):
    config = load_config(CONFIGS / "moeut" / "244m.yaml", overrides)
    small = check_choices(config, config.parallel.expert_parallel)
    for part in (small.model.attention, small.model.ffn):
        assert part.router.expert_dropout == 0, "each layout draws its own"
