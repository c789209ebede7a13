"""Any layout takes the same step as one process: loss, norm, every gradient, parameters.

Every rank has data of its own, sequences are padded, routing is uneven, assignments are dropped,
and some experts get no token. Stage 0 runs in fp64; DeepSpeed keeps fp32 masters at 1 to 3.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.errors import BadStepError, BadStepReason
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import (
    CAPACITY,
    MOA,
    SEQUENCES,
    Case,
    assert_equal,
    distributed,
    one_process,
    router,
)

FP64, FP32 = 1e-9, 1e-5


def check(pools, case: Case) -> None:
    reference = one_process(case)
    assert_equal(distributed(pools, case), reference, FP64 if case.precision == "fp64" else FP32)


def stage(number: int) -> dict:
    return {"zero_stage": number, "precision": "fp64" if number == 0 else "fp32"}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["gradients", "clipped"])
def test_sgd_step_with_drops(pools, zero_stage, clip_norm):
    case = Case(**stage(zero_stage), clip_norm=clip_norm)
    reference = one_process(case)
    assert reference.dropped > 0
    check(pools, case)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_adamw_step(pools, zero_stage):
    check(pools, Case(**stage(zero_stage), optimizer="adamw", clip_norm=0.1))


MODELS = {
    "moa, softmax moe with gates": {
        "num_distinct_layers": None,
        "norm_placement": "pre",
        "norm": "rmsnorm",
        "norm_eps": 1e-3,
        "final_norm_eps": 1e-2,
        "attention": MOA
        | {"output_bias": True, "router": router(5, 2, "softmax", gate="renormalized_detached")},
        "ffn": {
            "kind": "moe",
            "d_expert": 8,
            "gated": True,
            "activation": "silu",
            "output_bias": True,
            "router": router(64, 2, "softmax", balance={"switch": 0.1, "z_loss": 0.01}),
        },
    },
    "moa of two heads, dense ffn": {
        "attention": MOA
        | {"heads_per_expert": 2, "router": router(6, 3, "softmax", capacity=CAPACITY)},
        "ffn": {"kind": "dense", "d_ff": 24},
    },
    "dense attention, drops by position": {
        "norm_placement": "post",
        "attention": {"kind": "dense", "num_heads": 2, "d_head": 8},
        "ffn": {
            "kind": "moe",
            "d_expert": 8,
            "router": router(
                7, 3, capacity={"factor": 0.8, "policy": "position"}, balance={"entropy": 0.1}
            ),
        },
    },
}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_takes_the_fp32_step_to_bf16_accuracy(pools, zero_stage):
    """A wrong factor on any gradient, of experts say, would be an error of a half or more."""
    case = Case(zero_stage=zero_stage, precision="bf16")
    ours, reference = distributed(pools, case), one_process(case)
    initial = build_model(case.config().model).double().state_dict()
    assert ours.loss == pytest.approx(reference.loss, rel=1e-2)
    assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=3e-2)
    for part in ("embedding", "q.weight", "v.weight", "o.weight", "up.weight", "down.weight"):
        names = [n for n in initial if n.endswith(part) or n.startswith(part)]
        step, expected = (
            torch.cat([(o.parameters[n] - initial[n]).flatten() for n in names])
            for o in (ours, reference)
        )
        assert ((step - expected).norm() / expected.norm()).item() < 0.15, part


def test_gradient_that_is_not_finite_stops_the_run(pools):
    """Before the parameters change, at every stage."""
    for zero_stage in range(4):
        case = Case(**stage(zero_stage))
        for reason, grad_norm, changed in pools(2).run(poisoned_step, case):
            assert reason is BadStepReason.GRAD_NORM
            assert not math.isfinite(grad_norm)
            assert not changed


def poisoned_step(case: Case) -> tuple[BadStepReason, float, bool]:
    """On every rank: a step whose loss is finite and whose gradient is not.

    Returns the reason of its rejection, the norm, and whether it changed anything.
    """
    config, batch = case.config(), case.batch()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"))
    engine.model.final_norm.register_full_backward_hook(
        lambda _module, grads, _outputs: tuple(g * float("inf") for g in grads)
    )
    before = [f.view.clone() for f in engine.state.fragments(owned_only=True)]
    rows = torch.arange(mesh.rank, SEQUENCES, mesh.world_size).split(case.micro_batch)
    with pytest.raises(BadStepError) as error:
        engine.step([Batch(batch.tokens[r], batch.token_mask[r]) for r in rows], lr=1.0)
    after = [f.view for f in engine.state.fragments(owned_only=True)]
    changed = not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    engine.close()
    return error.value.reason, error.value.values["grad_norm"], changed


TROUBLE = ["spike", "nan", "gradient"]


@pytest.mark.parametrize("trouble", TROUBLE)
def test_refused_step_leaves_no_trace(pools, trouble):
    """The next one comes out bit for bit as if there had been none, at every stage."""
    layouts = [*map(stage, range(4)), {"zero_stage": 1, "precision": "bf16"}]
    for layout in layouts:
        case = Case(**layout, optimizer="adamw", clip_norm=0.1)
        for without, refused in zip(
            pools(2).run(steps_with_trouble, case, None),
            pools(2).run(steps_with_trouble, case, trouble),
            strict=True,
        ):
            assert without[0] == refused[0]
            assert all(torch.equal(a, b) for a, b in zip(without[1], refused[1], strict=True))


def steps_with_trouble(case: Case, trouble: str | None) -> tuple[list, list[torch.Tensor]]:
    """On every rank: two good steps, and a refused one between them if there is trouble."""
    config, batch = case.config(), case.batch()
    mesh = make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"))
    rows = torch.arange(mesh.rank, SEQUENCES, mesh.world_size).split(case.micro_batch)
    micro = [Batch(batch.tokens[r], batch.token_mask[r]) for r in rows]
    results = [engine.step(micro, lr=1e-2)]
    if trouble == "spike":
        with pytest.raises(BadStepError) as error:
            engine.step(micro, lr=1.0, loss_limit=0.1)
        assert error.value.reason is BadStepReason.SPIKE
        assert error.value.values["loss"] > error.value.values["limit"] == 0.1
    if trouble == "nan":  # on one rank only
        factor = float("nan") if mesh.rank == 1 else 1.0
        handle = engine.model.final_norm.register_forward_hook(lambda _m, _i, out: out * factor)
        with pytest.raises(BadStepError) as error:
            engine.step(micro, lr=1.0)
        assert error.value.reason is BadStepReason.LOSS
        assert math.isnan(error.value.values["cross_entropy"])
        handle.remove()
    if trouble == "gradient":
        handle = engine.model.final_norm.register_full_backward_hook(
            lambda _module, grads, _outputs: tuple(g * float("inf") for g in grads)
        )
        with pytest.raises(BadStepError) as error:
            engine.step(micro, lr=1.0)
        assert error.value.reason is BadStepReason.GRAD_NORM
        handle.remove()
    results.append(engine.step(micro, lr=1e-2))
    state = [f.view.clone() for f in engine.state.fragments(owned_only=True)]
    engine.close()
    return [(r.loss, r.grad_norm) for r in results], state


DENSE = {
    "attention": {"kind": "dense", "num_heads": 2, "d_head": 8},
    "ffn": {"kind": "dense", "d_ff": 24},
}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_model_without_experts(pools, zero_stage):
    check(pools, Case(**stage(zero_stage), expert_parallel=1, model=DENSE, clip_norm=0.1))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_other_models(pools, model, zero_stage):
    check(pools, Case(**stage(zero_stage), model=model))


def test_some_expert_gets_no_token():
    """The cases above would prove less without one."""
    case = Case(model=MODELS["moa, softmax moe with gates"])
    assert one_process(case).unused_experts > 0


@pytest.mark.parametrize("model", [{}, *MODELS.values()], ids=["switchhead", *MODELS.keys()])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_weights_travel_instead_of_tokens(pools, model, zero_stage):
    check(pools, Case(**stage(zero_stage), model=model, exchange="weights", clip_norm=0.1))


LAYOUTS = {
    "weights travel, recomputed": Case(exchange="weights", recompute=True),
    "weights travel, ep 2 x edp 2": Case(exchange="weights", world_size=4),
    "weights travel, ep 4, ZeRO 3": Case(
        exchange="weights", world_size=4, expert_parallel=4, recompute=True, **stage(3)
    ),
    "one rank": Case(world_size=1, expert_parallel=1, micro_batch=8),
    "data parallel only": Case(expert_parallel=1),
    "one micro-batch": Case(micro_batch=4),
    "recomputed": Case(recompute=True),
    "attention recomputed, weights travel, ZeRO 3": Case(
        exchange="weights", recompute=("attention", "experts"), **stage(3)
    ),
    "ffn recomputed, ZeRO 3": Case(recompute=("ffn", "experts"), **stage(3)),
    "experts recomputed, weights travel": Case(exchange="weights", recompute=("experts",)),
    "no padding": Case(padded=False),
    "ep 2 x edp 2": Case(world_size=4),
    "ep 2 x edp 2, ZeRO 2": Case(world_size=4, **stage(2)),
    "ep 2 x edp 2, ZeRO 3, recomputed": Case(world_size=4, recompute=True, **stage(3)),
    "ep 4, ZeRO 1": Case(world_size=4, expert_parallel=4, **stage(1)),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(pools, case):
    check(pools, replace(case, clip_norm=0.1))
