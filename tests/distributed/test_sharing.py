"""Models that share layers by part take the step of one process in every layout.

Two distinct layers are applied four times between prelude and coda. Numbers of experts do not
divide over ranks, every rank has data of its own, and buckets are tiny.
"""

from itertools import product
from typing import Any

import pytest

from moa_dist.config.sharing_checks import repeats, sharing
from tests.cover import covering
from tests.distributed import test_reshard as reshard
from tests.distributed import test_traffic as traffic
from tests.distributed.layouts import MOA, SWITCHHEAD, Case, assert_equal, distributed, one_process
from tests.distributed.layouts import router as router_config
from tests.distributed.test_engine import FP32, FP64, stage
from tests.distributed.test_verify import on_rank

DENSE = {"kind": "dense", "num_heads": 2, "d_head": 8}
BIASED = {"entropy": 0.1, "bias_rate": 0.01}
MOE = {"kind": "moe", "d_expert": 8, "router": router_config(7, 2, balance=BIASED)}
ATTENTION: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "moa": MOA | {"router": router_config(5, 2, "softmax", balance={"entropy": 0.1})},
    "switchhead": SWITCHHEAD | {"router": router_config(3, 2, balance={"entropy": 0.1})},
}
SHARED: dict[str, dict[str, Any]] = {
    "prelude and coda": {"prelude": 1, "coda": 1, "prelude_ffn": {"d_ff": 24}},
    "tied experts": {
        "prelude": 1,
        "prelude_ffn": {"d_ff": 24},
        "sharing": {"own": ["attention", "norms", "routers"]},
    },
    "own routers": {"sharing": {"own": ["routers"], "order": "sequence"}},
    "own ffn": {"coda": 1, "sharing": {"own": ["ffn", "norms"]}},
    "adapters": {"sharing": {"own": ["norms"], "adapter_rank": 2, "vectors": True}},
    "everything": {
        "prelude": 1,
        "coda": 1,
        "sharing": {"own": ["norms", "routers"], "adapter_rank": 3, "vectors": True},
    },
}


def model_of(name: str, attention: str = "switchhead", **more: Any) -> dict[str, Any]:
    fields = SHARED[name] | more
    num_layers = 4 + fields.get("prelude", 0) + fields.get("coda", 0)
    sections = {"attention": ATTENTION[attention], "ffn": MOE}
    return {"num_layers": num_layers, "num_distinct_layers": 2, **sections, **fields}


def case_of(name: str, layout: tuple[int, int], zero_stage: int, **more: Any) -> Case:
    world_size, expert_parallel = layout
    fields = {
        "optimizer": "adamw",
        "eps": 1e-3,
        "micro_batch": 8 // world_size // 2,
        **stage(zero_stage),
        **more,
    }
    fields = {"model": model_of(name)} | fields
    return Case(world_size=world_size, expert_parallel=expert_parallel, **fields)


def check(pools, case: Case) -> None:
    config = case.config()
    assert not [*repeats(config), *sharing(config)]
    bound = FP64 if case.precision == "fp64" else FP32
    assert_equal(distributed(pools, case), one_process(case), bound)


DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "name": tuple(SHARED),
    "layout": ((2, 1), (2, 2), (4, 2)),  # W, ep
    "zero_stage": (0, 1, 2, 3),
    "exchange": ("tokens", "weights"),
    "recompute": (False, True),
}
PRODUCT = [
    dict(zip(DIMENSIONS, values, strict=True)) | {"attention": list(ATTENTION)[i % 3]}
    for i, values in enumerate(product(*DIMENSIONS.values()))
]
CELLS = [PRODUCT[i] for i in covering(PRODUCT, strength=3)]


@pytest.mark.pairwise
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(map(str, cell.values())))
def test_step_equals_one_process(pools, cell):
    recompute = cell["recompute"]
    case = case_of(
        cell["name"],
        cell["layout"],
        cell["zero_stage"],
        exchange=cell["exchange"],
        recompute=recompute,
        model=model_of(
            cell["name"], cell["attention"], norm_placement="pre" if recompute else "peri"
        ),
    )
    check(pools, case)


@pytest.mark.parametrize("name", ["tied experts", "everything"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_muon_step(pools, name, zero_stage):
    check(pools, case_of(name, (2, 2), zero_stage, optimizer="muon"))


@pytest.mark.parametrize(("zero_stage", "exchange"), [(0, "tokens"), (3, "weights")])
def test_encoder_and_decoder(pools, zero_stage, exchange):
    model = model_of("everything", "moa", objective="translation")
    check(pools, case_of("everything", (2, 2), zero_stage, exchange=exchange, model=model))


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_sent_bytes_are_those_predicted(pools, name, exchange):
    # Biases would send their loads, too; and what is counted here by the name of a router does not
    # tell apart the parts that borrow it.
    attention = "dense" if name == "adapters" else "switchhead"
    model = model_of(name, attention, ffn=MOE | {"router": router_config(7, 2)})
    traffic.check(pools, case_of(name, (2, 2), 1, exchange=exchange, recompute=True, model=model))


def test_another_layout_continues_a_checkpoint(pools, tmp_path):
    saved = case_of("everything", (4, 4), 3)
    resumed = case_of("everything", (2, 1), 1)
    before = pools(4).run(reshard.train_and_save, saved, 1, tmp_path)
    after = pools(2).run(reshard.resume_each, resumed, {"": tmp_path})
    states = [result[""][0] for result in after]
    expected = reshard.whole([state for state, _ in before], saved)
    found = reshard.whole(states, resumed)
    assert expected.keys() == found.keys()
    assert all(expected[key].equal(found[key]) for key in expected)
    assert after[0][""][1] == pytest.approx(before[0][1], rel=1e-5)


@pytest.mark.parametrize("name", ["tied experts", "everything"])
def test_the_shrunken_copy_that_verify_checks(pools, name):
    config = case_of(name, (2, 2), 2).config()
    for report in pools(2).run(on_rank, config):
        assert report.checks
        assert [check for check in report.checks if not check.equal] == []
        assert report.config.model.sharing == config.model.sharing
