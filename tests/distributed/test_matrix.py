"""Any layout takes the same step as one process, crossed with all that a layout might disturb.

The full product has 840 thousand cells. `covering_cells` picks about a hundred, so that any
three values of three dimensions that can occur together do so in at least one of them: hence
all pairs, and every layout at every ZeRO stage with every value of every other dimension.
Without `--full`, about thirty of them run, which hold all pairs.

In each cell every rank has data of its own, sequences are padded (one is padding alone), and
some expert gets no token. SGD has rate 1: unclipped, its step is the gradient.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import combinations, product
from random import Random
from typing import Any

import pytest
import torch

from tests.cover import covering
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, assert_equal, distributed, one_process
from tests.distributed.layouts import router as router_config

SEQUENCES = 16
FP64, FP32 = 1e-9, 1e-5

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)),  # W, ep
    "zero_stage": (0, 1, 2, 3),
    "exchange": ("tokens", "weights"),
    "overlap": (False, True),
    "accumulation": (1, 2, 4),
    "recompute": (False, True),
    "capacity": ("dropless", "probability", "position"),
    "layers": ("distinct", "shared"),
    "attention": ("moa", "switchhead", "dense"),
    "ffn": ("sigma-moe", "softmax-moe", "dense"),
    "parts": ("plain", "local", "shared"),
    "norm_placement": ("pre", "post", "peri"),
    "step": ("sgd", "sgd-clipped", "adamw"),
}
"""A dimension named like a field of `Case` sets that field. `parts` are options of layers: `local`
has windows, scaled rotations, soft caps and a z-loss; `shared` has shared experts, groups of
experts and scaled weights."""

Cell = dict[str, Any]
"""A value for every dimension, or for some of them."""


def impossible(cell: Cell) -> bool:
    """No model without experts has these values."""
    return cell.get("attention") == cell.get("ffn") == "dense" and (
        cell.get("layout", (1, 1))[1] > 1
        or cell.get("exchange", "tokens") != "tokens"
        or cell.get("overlap", False)
        or cell.get("capacity", "dropless") != "dropless"
    )


def tuples(names: Iterable[str], strength: int) -> Iterator[Cell]:
    """Every choice of values of every `strength` dimensions among `names`."""
    for chosen in combinations(names, strength):
        for values in product(*(DIMENSIONS[name] for name in chosen)):
            yield dict(zip(chosen, values, strict=True))


def covering_cells(strength: int, seed: int) -> list[Cell]:
    """Cells that contain every possible tuple. Greedy: begin a cell with a tuple still missing,
    then give each other dimension the value that adds most of the missing ones."""
    random = Random(seed)
    in_order = [tuple(t.items()) for t in tuples(DIMENSIONS, strength) if not impossible(t)]
    missing = set(map(frozenset, in_order))
    cells = []

    def gain(cell: Cell, name: str) -> int:
        others = [item for item in cell.items() if item[0] != name]
        added = (name, cell[name])
        return sum(
            frozenset((added, *rest)) in missing for rest in combinations(others, strength - 1)
        )

    for begin in in_order:
        if frozenset(begin) not in missing:
            continue
        cell = dict(begin)
        for name in random.sample(list(DIMENSIONS), len(DIMENSIONS)):
            if name not in cell:
                candidates = [cell | {name: value} for value in DIMENSIONS[name]]
                candidates = [c for c in candidates if not impossible(c)]
                cell = max(candidates, key=lambda c: (gain(c, name), random.random()))
        missing.difference_update(map(frozenset, combinations(cell.items(), strength)))
        cells.append({name: cell[name] for name in DIMENSIONS})
    return cells


CELLS = covering_cells(strength=3, seed=0)


def name_of(cell: Cell) -> str:
    world_size, expert_parallel = cell["layout"]
    words = [
        f"W{world_size} ep{expert_parallel} ZeRO{cell['zero_stage']} {cell['exchange']}",
        "overlap" if cell["overlap"] else "",
        f"accumulate{cell['accumulation']}",
        "recompute" if cell["recompute"] else "",
        cell["capacity"],
        cell["layers"],
        "" if cell["parts"] == "plain" else cell["parts"],
        f"{cell['attention']}+{cell['ffn']} {cell['norm_placement']} {cell['step']}",
    ]
    return " ".join(word for word in words if word)


LOCAL = {
    "window": {"size": 4, "full_every": 2},
    "soft_cap": 2.0,
    "rope": {"scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16}},
}


def sections(cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attention and FFN of the model, with the parts that the cell asks for."""
    capacity = {"factor": 1.0, "policy": cell["capacity"]}
    capacity = None if cell["capacity"] == "dropless" else capacity
    is_shared = cell["parts"] == "shared"
    # Numbers of experts that no number of ranks divides: shards of unequal size.
    sizes = {"moa": (21, 2), "switchhead": (15, 2), "ffn": (25, 3)}
    groups = {"moa": (7, 2), "switchhead": (5, 2), "ffn": (5, 2)}

    def routing(name: str, score: str, balance: dict[str, float], **more: Any) -> dict[str, Any]:
        if is_shared:
            num_groups, top_groups = groups[name]
            limit = {"num_groups": num_groups, "top_groups": top_groups}
            more = more | {"group_limit": limit, "route_scale": 1.5}
        config = router_config(*sizes[name], score, capacity=capacity, balance=balance, **more)
        return {"router": config}

    attention = {
        "moa": MOA | routing("moa", "softmax", {"mutual_information": 0.1}),
        "switchhead": SWITCHHEAD
        | routing("switchhead", "sigmoid", {"entropy": 0.1, "z_loss": 0.01}),
        "dense": {"kind": "dense", "num_heads": 2, "d_head": 8},
    }[cell["attention"]]
    experts = {"kind": "moe", "d_expert": 8}
    gate = "renormalized_detached"
    ffn = {
        "sigma-moe": experts | routing("ffn", "sigmoid", {"entropy": 0.1}),
        "softmax-moe": experts
        | {"gated": True, "activation": "silu"}
        | routing("ffn", "softmax", {"switch": 0.1, "z_loss": 0.01}, gate=gate),
        "dense": {"kind": "dense", "d_ff": 24},
    }[cell["ffn"]]
    if cell["parts"] == "local":
        attention |= LOCAL
    if is_shared and cell["attention"] != "dense":
        attention |= {"shared_experts": 1 if cell["attention"] == "moa" else True}
    if is_shared and cell["ffn"] != "dense":
        ffn |= {"shared_expert": {"d_expert": 6, "sigmoid_gate": True}}
    return attention, ffn


def case_of(cell: Cell) -> Case:
    attention, ffn = sections(cell)
    named_fields = {f.name for f in fields(Case)} & cell.keys()
    world_size, expert_parallel = cell["layout"]
    return Case(
        **{name: cell[name] for name in named_fields},
        world_size=world_size,
        expert_parallel=expert_parallel,
        micro_batch=SEQUENCES // (world_size * cell["accumulation"]),
        precision="fp64" if cell["zero_stage"] == 0 else "fp32",
        optimizer="adamw" if cell["step"] == "adamw" else "sgd",
        clip_norm=None if cell["step"] == "sgd" else 0.1,
        eps=1e-3,
        skewed=True,
        sequences=SEQUENCES,
        z_loss=0.1 if cell["parts"] == "local" else 0.0,
        model={
            "num_layers": 2,
            "num_distinct_layers": 1 if cell["layers"] == "shared" else 2,
            "norm_placement": cell["norm_placement"],
            # Else equal tokens of a sequence tie in the first layer, and rounding decides who
            # is dropped.
            "position": "sinusoidal",
            "attention": attention,
            "ffn": ffn,
            "logit_soft_cap": 3.0 if cell["parts"] == "local" else None,
        },
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_step_equals_one_process(pools, cell):
    case = case_of(cell)
    reference = one_process(case)
    if cell["attention"] != "dense" or cell["ffn"] != "dense":
        assert reference.aux_losses
        assert reference.unused_experts > 0
        assert (reference.dropped > 0) == (cell["capacity"] != "dropless")
    if case.clip_norm is not None:
        assert reference.grad_norm > case.clip_norm
    assert_equal(distributed(pools, case), reference, FP64 if case.zero_stage == 0 else FP32)


def test_cells_hold_every_pair_and_every_possible_triple():
    assert len(CELLS) >= 100
    for strength in (2, 3):
        covered = {frozenset(c) for cell in CELLS for c in combinations(cell.items(), strength)}
        missing = [t for t in tuples(DIMENSIONS, strength) if frozenset(t.items()) not in covered]
        assert all(impossible(t) for t in missing)
        assert strength == 3 or not missing
    assert not any(impossible(cell) for cell in CELLS)


def test_default_run_holds_every_pair():
    chosen = [CELLS[i] for i in covering(CELLS)]
    covered = {frozenset(c) for cell in chosen for c in combinations(cell.items(), 2)}
    assert all(frozenset(pair.items()) in covered for pair in tuples(DIMENSIONS, 2))
    assert len(chosen) <= 32


def test_ranks_have_different_amounts_of_data():
    """And at the finest split some micro-batch has no token at all."""
    batch = case_of(CELLS[0]).batch()
    for world_size in (2, 4):
        targets = [
            batch.token_mask[rank::world_size, 1:].sum().item() for rank in range(world_size)
        ]
        assert len(set(targets)) == world_size
    assert 0 in batch.token_mask.sum(1)
    assert not torch.equal(batch.tokens[0], batch.tokens[1])
