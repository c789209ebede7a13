"""Norms by part are those of one process in every layout, and their report is one collective."""

from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.parameter_parts import Part, parameter_parts
from moa_dist.moe.sharding import shard_experts
from moa_dist.observe.metrics import PartNorms
from moa_dist.train.engine import Engine
from moa_dist.train.part_norms import part_norms
from moa_dist.train.step_sync import gather_interval
from moa_dist.train.step_timer import StepInterval
from tests.distributed.layouts import AS_IF_LARGE, SWITCHHEAD, Case, micro_batches, one_process
from tests.distributed.test_engine import DENSE, stage
from tests.distributed.test_objectives import case_of
from tests.fake_cuda.host_waits import host_waits

GRID = [
    (world_size, expert_parallel)
    for world_size, expert_parallel in product((1, 2, 4), repeat=2)
    if expert_parallel <= world_size
]


def norms_of(case: Case) -> tuple[dict[str, PartNorms], float, int]:
    """Runs on every rank: norms of the last step by part, the global norm, and collectives."""
    config, mesh = case.config(), make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    for step in range(1, case.steps + 1):
        result = engine.step(
            micro_batches(case, mesh, step), config.optimizer.lr, measure_parts=step == case.steps
        )
    before = mesh.comm_timer.progress.begun
    lap = StepInterval(1, 1.0, 0.0)
    interval = gather_interval({}, {}, lap, mesh, engine.device, result.part_squares)
    begun = mesh.comm_timer.progress.begun - before
    engine.close()
    return part_norms(interval.part_squares, result.grad_norm), result.grad_norm, begun


def expected(case: Case) -> dict[str, PartNorms]:
    """On one process, of a step of SGD whose rate is 1: there, updates are clipped gradients."""
    outcome, model = one_process(case), build_model(case.config().model).double()
    initial, parts = model.state_dict(), parameter_parts(model)
    found = {}
    for part in Part:
        names = [name for name in parts if parts[name] is part]
        if names:
            old, new = (
                torch.cat([values[name].flatten() for name in names])
                for values in (initial, outcome.parameters)
            )
            update = (new - old).norm().item()
            limit = case.clip_norm or outcome.grad_norm
            factor = min(1.0, limit / (outcome.grad_norm + 1e-6 * bool(case.clip_norm)))
            found[part.value] = PartNorms(update / factor, update / old.norm().item())
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", GRID, ids="W{0[0]} ep{0[1]}".format)
def test_norms_equal_one_process(pools, layout, zero_stage):
    world_size, expert_parallel = layout
    case = Case(
        **stage(zero_stage),
        world_size=world_size,
        expert_parallel=expert_parallel,
        clip_norm=0.1,
    )
    wanted = expected(case)
    assert set(wanted) == {part.value for part in Part}
    for norms, grad_norm, collectives in pools(world_size).run(norms_of, case):
        assert norms.keys() == wanted.keys()
        for part, of_part in wanted.items():
            assert norms[part] == pytest.approx(of_part, rel=1e-5), part
        assert sum(n.grad_norm**2 for n in norms.values()) == pytest.approx(grad_norm**2)
        assert collectives == 1


def waits_of_steps(case: Case) -> list[tuple[Counter, int]]:
    """Runs on every rank: what the host waits for, and collectives, without measuring and with."""
    config, mesh = case.config(), make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    engine.step(micro_batches(case, mesh), config.optimizer.lr)  # in which ZeRO learns the order
    found = []
    for measure_parts in (False, True):
        before = mesh.comm_timer.progress.begun
        with host_waits() as waits:
            batches = micro_batches(case, mesh)
            result = engine.step(batches, config.optimizer.lr, measure_parts=measure_parts)
        assert (result.part_squares is not None) == measure_parts
        found.append((Counter(waits), mesh.comm_timer.progress.begun - before))
    engine.close()
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_measuring_adds_no_wait_and_no_collective(pools, zero_stage):
    for without, measured in pools(2).run(waits_of_steps, Case(**stage(zero_stage))):
        assert without[0].total() > 0
        assert measured == without


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_norms_of_other_optimizers_agree_between_layouts(pools, optimizer, zero_stage):
    """Muon calls AdamW's step within its own."""
    steps = {"optimizer": optimizer, "steps": 2, "eps": 1e-3}
    (alone,) = pools(1).run(norms_of, Case(world_size=1, expert_parallel=1, **steps))
    for norms, *_ in pools(2).run(norms_of, Case(**stage(zero_stage), **steps)):
        for part, of_part in alone[0].items():
            assert norms[part] == pytest.approx(of_part, rel=1e-3), part


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16(pools, zero_stage):
    case = Case(zero_stage=zero_stage, precision="bf16")
    wanted = expected(case)
    for norms, grad_norm, _ in pools(2).run(norms_of, case):
        assert norms["ffn_experts"] == pytest.approx(wanted["ffn_experts"], rel=0.1)
        assert sum(n.grad_norm**2 for n in norms.values()) == pytest.approx(grad_norm**2)


def test_parts_that_a_model_lacks_are_left_out(pools):
    case = Case(world_size=1, expert_parallel=1, model=DENSE)
    ((norms, grad_norm, _),) = pools(1).run(norms_of, case)
    assert list(norms) == ["dense"]
    assert norms["dense"].grad_norm == pytest.approx(grad_norm)


def test_cross_attention_is_attention():
    model = build_model(case_of("translation", SWITCHHEAD).config().model)
    experts = {
        part: {name.split(".")[3] for name, p in parameter_parts(model).items() if p is part}
        for part in (Part.ATTENTION_EXPERTS, Part.FFN_EXPERTS)
    }
    assert experts == {Part.ATTENTION_EXPERTS: {"attention", "cross"}, Part.FFN_EXPERTS: {"ffn"}}
