"""Bytes predicted equal bytes counted, and both equal what torch.distributed was asked to send.

Counted: by the ledger, and by a dispatch mode that sees every collective of torch, DeepSpeed's
included. What tokens send depends on the router, so for it the prediction is given the rows that
travel, found anew from the experts chosen; for a router that takes all experts it needs nothing.
"""

from collections import defaultdict
from functools import partial
from itertools import combinations, product
from math import comb
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moa_dist.config.recompute import recomputed_parts
from moa_dist.config.routers import GroupLimitConfig
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.moe.experts import expert_layers, shard_starts
from moa_dist.moe.router import Router
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.exchange_choice import expected_traffic
from moa_dist.plan.predicted_traffic import (
    Layout,
    Rows,
    expected_rows,
    expert_traffic,
    state_traffic,
)
from moa_dist.train.engine import Engine
from tests.distributed.layouts import (
    AS_IF_LARGE,
    MOA,
    Case,
    micro_batches,
    router,
)
from tests.distributed.test_family import FAMILY

KINDS = {
    "moeut": {},
    "moa": {
        "attention": MOA | {"router": router(6, 2, "softmax")},
        "ffn": {"kind": "moe", "d_expert": 8, "router": router(5, 3, "softmax")},
        "norm_placement": "pre",
    },
}
ALL_EXPERTS = {
    "attention": {"kind": "switchhead", "num_heads": 2, "d_head": 8, "router": router(3, 3)},
    "ffn": {"kind": "moe", "d_expert": 8, "router": router(5, 5)},
}


class Wire(TorchDispatchMode):
    """Sums the bytes that each collective takes away from this rank, by its name.

    A few numbers are left out: by them ranks agree on losses and norms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[str, int] = defaultdict(int)
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func.namespace == "c10d"
        if func.namespace == "c10d" and func._schema.name != "c10d::broadcast_":
            name = func._schema.name
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            P, rank = group.size(), group.rank()
            match name:
                case "c10d::alltoall_base_":
                    _, sent, _, _, splits = args[:5]
                    counts = splits or [len(sent) // P] * P
                    rows = sum(counts) - counts[rank]
                    self.num_bytes[name] += rows * sent.shape[1:].numel() * sent.element_size()
                case "c10d::_allgather_base_":
                    self.num_bytes[name] += (P - 1) * args[1].nbytes
                case "c10d::_reduce_scatter_base_":
                    self.num_bytes[name] += (P - 1) * args[0].nbytes
                case "c10d::allreduce_":
                    (tensor,) = args[0]
                    if tensor.numel() > 8:
                        self.num_bytes[name] += 2 * (P - 1) * tensor.nbytes // P
                case _:
                    raise AssertionError(f"a collective that this test does not know: {name}")
        return func(*args, **(kwargs or {}))


class Counted(NamedTuple):
    """One step on one rank."""

    traffic_counter: dict[TrafficKey, TrafficVolume]
    wire: dict[str, int]
    rows: dict[tuple[str, str], Rows]
    """(layer, router) -> rows for other ranks, found anew from the experts chosen."""


def on_rank(case: Case) -> Counted:
    config = case.config()
    exchange = config.parallel.expert_exchange
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh, exchange=exchange)
    model = build_model(config.model, recompute=case.recompute, parallelize=shard)
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    rows: dict[tuple[str, str], Rows] = defaultdict(lambda: Rows(0, 0, 0))

    def note(name: str, router: Router, output: Any) -> None:
        starts = shard_starts(router.num_experts, case.expert_parallel)
        owner = torch.bucketize(output.topk_ids, torch.tensor(starts[1:]), right=True)
        kept = (
            output.keep_mask
            if output.keep_mask is not None
            else torch.ones_like(owner, dtype=torch.bool)
        )
        others = [r for r in range(case.expert_parallel) if r != mesh.ep_group.rank()]
        goes = kept & (owner == torch.tensor(others)[:, None, None, None])  # [P - 1, T, G, K]
        more = (goes.any(-1).any(-1).sum(), goes.any(-1).sum(), goes.sum())
        layer, _, router_name = name.rpartition(".")
        old = rows[layer, router_name]
        rows[layer, router_name] = Rows(*(a + int(b) for a, b in zip(old, more, strict=True)))

    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda m, _, output, name=name: note(name, m, output))
    batches = micro_batches(case, mesh)
    if case.zero_stage == 3:
        engine.step(batches, lr=0.1)  # in which it learns the order of modules
    rows.clear()
    begun = mesh.comm_timer.progress.begun
    with Wire() as wire:
        result = engine.step(batches, lr=0.1)
    begun = mesh.comm_timer.progress.begun - begun
    assert begun == wire.num_calls, "each collective, ours or DeepSpeed's, counts as waiting"
    engine.close()
    return Counted(result.traffic, dict(wire.num_bytes), dict(rows))


def add_up(results: list[Counted]) -> Counted:
    """All ranks together."""
    traffic_counter: dict[TrafficKey, TrafficVolume] = {}
    wire: dict[str, int] = defaultdict(int)
    rows: dict[tuple[str, str], Rows] = {}
    for result in results:
        for key, volume in result.traffic_counter.items():
            traffic_counter[key] = (
                traffic_counter[key].plus(volume) if key in traffic_counter else volume
            )
        for name, num_bytes in result.wire.items():
            wire[name] += num_bytes
        for key, more in result.rows.items():
            old = rows.get(key, Rows(0, 0, 0))
            rows[key] = Rows(*(a + b for a, b in zip(old, more, strict=True)))
    return Counted(traffic_counter, wire, rows)


def layout_of(case: Case) -> Layout:
    model = case.config().model
    return Layout(
        world_size=case.world_size,
        expert_parallel=case.expert_parallel,
        num_micro_batches=case.sequences // (case.world_size * case.micro_batch),
        num_repeats=model.num_layers // (model.num_distinct_layers or model.num_layers),
        recompute=recomputed_parts(case.recompute),
        element_bytes=8 if case.precision == "fp64" else 4,
        exchange=case.config().parallel.expert_exchange,
    )


def model_of(case: Case) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(case.config().model)


def sizes_of(case: Case) -> tuple[list[int], list[int]]:
    """Elements of each dense and each expert parameter on one rank."""
    model = model_of(case)
    experts = dict(expert_layers(model))
    dense = [
        p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") not in experts
    ]
    shards = [
        -(-e.num_experts // case.expert_parallel) * e.macs_per_row() for e in experts.values()
    ]
    return dense, shards


LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def case_of(
    model: dict[str, Any], exchange: str, world_size: int, expert_parallel: int, zero_stage: int
) -> Case:
    return Case(
        world_size=world_size,
        expert_parallel=expert_parallel,
        zero_stage=zero_stage,
        precision="fp64" if zero_stage == 0 else "fp32",
        micro_batch=8 // world_size // 2,
        exchange=exchange,
        recompute=zero_stage == 1,
        model=model,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize(("world_size", "expert_parallel"), LAYOUTS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_counted_equals_predicted(pools, kind, exchange, world_size, expert_parallel, zero_stage):
    check(pools, case_of(KINDS[kind], exchange, world_size, expert_parallel, zero_stage))


@pytest.mark.parametrize(("exchange", "zero_stage"), [("tokens", 1), ("weights", 2)])
def test_encoders_and_attention_to_them_are_predicted_too(pools, exchange, zero_stage):
    check(pools, case_of(KINDS["moa"] | {"objective": "translation"}, exchange, 2, 2, zero_stage))


def check(pools, case: Case) -> None:
    counted = add_up(pools(case.world_size).run(on_rank, case))
    layout = layout_of(case)
    # Recomputation runs the router again.
    forwards = 2 if case.recompute else 1
    rows = {key: Rows(*(n // forwards for n in r)) for key, r in counted.rows.items()}
    predicted = expert_traffic(model_of(case), layout, lambda *key: rows[key])
    ours = {key: v for key, v in counted.traffic_counter.items() if key.purpose != "reduce"}
    assert ours == predicted

    states = state_traffic(*sizes_of(case), layout, case.zero_stage, AS_IF_LARGE)
    assert sum(counted.wire.values()) == (
        sum(states) + sum(volume.num_bytes for volume in predicted.values())
    )
    if case.zero_stage == 0:
        reduced = [
            v.num_bytes for key, v in counted.traffic_counter.items() if key.purpose == "reduce"
        ]
        assert sum(reduced) == states.gradients


@pytest.mark.parametrize(
    ("world_size", "model"),
    [(2, ALL_EXPERTS), (4, ALL_EXPERTS), (2, FAMILY["ds_moe"])],
    ids=["W 2", "W 4", "W 2, in training alone"],
)
def test_prediction_needs_no_router_where_every_expert_is_taken(pools, world_size, model):
    case = Case(world_size=world_size, expert_parallel=world_size, padded=False, model=model)
    counted = add_up(pools(world_size).run(on_rank, case))
    config = case.config()
    exchange = config.parallel.expert_exchange
    predicted = expected_traffic(config, world_size, exchange, model_of(case))
    assert {f: v for f, v in counted.traffic_counter.items() if f.purpose != "reduce"} == predicted


def test_expected_rows_of_many_choices():
    """16 of 64 experts on 4 ranks: a token goes to nearly every rank, once instead of 4 times."""
    rows = expected_rows(1000, num_groups=1, num_experts=64, top_k=16, num_ranks=4)
    missed = comb(48, 16) / comb(64, 16)
    assert rows.token == rows.group == pytest.approx(3 * 1000 * (1 - missed))
    assert rows.slot == pytest.approx(1000 * 16 * 3 / 4)
    assert rows.token / rows.slot == pytest.approx(4 * (1 - missed) / 16)  # 0.2488


@pytest.mark.parametrize(
    ("num_groups", "num_experts", "limit", "num_ranks"),
    [(1, 12, (4, 2), 4), (1, 15, (5, 2), 4), (2, 6, (3, 1), 4), (3, 8, (2, 1), 5)],
)
def test_expected_rows_within_groups_of_experts(num_groups, num_experts, limit, num_ranks):
    """Counted over every choice that there is."""
    top_k, size = 2, num_experts // limit[0]
    starts = shard_starts(num_groups * num_experts, num_ranks)
    rank_of = {e: r for r in range(num_ranks) for e in range(starts[r], starts[r + 1])}
    choices = [
        chosen
        for parts in combinations(range(limit[0]), limit[1])
        for chosen in combinations(
            [e for p in parts for e in range(p * size, p * size + size)], top_k
        )
    ]
    per_group = [
        [{rank_of[g * num_experts + e] for e in chosen} for chosen in choices]
        for g in range(num_groups)
    ]
    # Each choice of groups holds equally many choices of experts, so all weigh alike.
    group = sum(len(ranks) for sets in per_group for ranks in sets) / len(choices)
    token = (
        sum(len(set().union(*sets)) for sets in product(*per_group)) / len(choices) ** num_groups
    )
    rows = expected_rows(
        1000, num_groups=num_groups, num_experts=num_experts, top_k=top_k, num_ranks=num_ranks,
        group_limit=GroupLimitConfig(num_groups=limit[0], top_groups=limit[1]),
    )  # fmt: skip
    others = 1000 * (num_ranks - 1) / num_ranks
    assert rows == pytest.approx((token * others, group * others, num_groups * top_k * others))
