"""Bytes of states predicted equal those of DeepSpeed's tensors on the fullest rank."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.distributed.mirror import mirrored_job
from moa_dist.models.language_model import build_model, meta_model
from moa_dist.models.objective import objective
from moa_dist.moe.sharding import shard_experts
from moa_dist.plan.exchange_choice import layout_of
from moa_dist.plan.states import States, sizes_of, states
from moa_dist.plan.terms import total
from moa_dist.train.engine import Engine
from tests.distributed.layouts import (
    AS_IF_LARGE,
    SWITCHHEAD,
    Case,
    micro_batches,
    router,
)
from tests.distributed.pool import PRELOADED, TIMEOUT_S


def num_bytes(*found: Any) -> int:
    """Of all tensors in these attributes; tensors that share memory count once."""
    storages = {}
    for tensor in tensors_in(found):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(found: Any) -> Iterable[Tensor]:
    if isinstance(found, Tensor):
        if found.dim():  # not a count of steps
            yield found
    elif isinstance(found, dict):
        yield from tensors_in(list(found.values()))
    elif isinstance(found, Iterable):
        for item in found:
            yield from tensors_in(item)


def measured(engine: Engine) -> dict[str, int]:
    """What there is now."""
    parameters = list(engine.model.parameters())
    zero = engine.deepspeed.optimizer

    def of_zero(*names: str) -> list[Any]:
        return [getattr(zero, name, None) for name in names] if engine.zero_stage else []

    return {
        "parameters": num_bytes(parameters, [getattr(p, "ds_tensor", None) for p in parameters]),
        "gradients": num_bytes(
            [p.grad for p in parameters],
            of_zero(
                "fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer"
            ),
        ),
        "masters": num_bytes(
            of_zero(
                "single_partition_of_fp32_groups",
                "fp32_groups_flat_partition",
                "fp32_partitioned_groups_flat",
            )
        ),
        "moments": num_bytes([engine.optimizer.state[p] for p in engine.optimizer.state]),
    }


def on_rank(case: Case) -> dict[str, int]:
    return most_of(case, make_mesh(case.expert_parallel))


def among_mirror_images(case: Case) -> dict[str, int]:
    with mirrored_job(0, case.world_size):
        return most_of(case, make_mesh(case.expert_parallel))


def most_of(case: Case, mesh: Mesh) -> dict[str, int]:
    """The most there is between micro-batches of a second step."""
    most: Counter[str] = Counter()

    def note(engine: Engine) -> None:
        most.update({n: max(0, size - most[n]) for n, size in measured(engine).items()})

    during_steps(case, mesh, note)
    return dict(most)


def during_steps(case: Case, mesh: Mesh, note: Callable[[Engine], None]) -> None:
    """Call `note` after a first step and between micro-batches of a second one."""
    config = case.config()
    shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    engine = Engine(
        build_model(config.model, parallelize=shard), config, mesh, torch.device("cpu"), AS_IF_LARGE
    )
    engine.step(micro_batches(case, mesh), lr=0.1)
    note(engine)
    for i, batch in enumerate(micro_batches(case, mesh), start=1):
        engine.deepspeed.backward(objective(engine.deepspeed, batch).loss(1.0))
        if i < case.sequences // (case.world_size * case.micro_batch):
            engine.deepspeed.step()
        note(engine)
    engine.close()


@pytest.mark.parametrize(
    ("zero_stage", "expert_parallel", "precision"),
    [
        (0, 2, "fp64"),
        (1, 1, "fp32"),
        (1, 4, "bf16"),
        (2, 2, "fp32"),
        (2, 4, "bf16"),
        (3, 1, "bf16"),
        (3, 4, "fp32"),
    ],
)
def test_predicted_states_are_those_of_the_fullest_rank(
    pools, zero_stage, expert_parallel, precision
):
    case = Case(
        world_size=4,
        expert_parallel=expert_parallel,
        zero_stage=zero_stage,
        precision=precision,
        micro_batch=1,
        optimizer="adamw",
    )
    found = pools(4).run(on_rank, case)
    most = {name: max(rank[name] for rank in found) for name in found[0]}
    assert most == predicted(case)


HELD_BY_ZERO = {
    "masters": ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"),
    "sums": ("averaged_gradients",),
    "of the device": ("temp_grad_buffer_for_gpu_offload",),
    "of the host": (
        "param_buffer_of_bit16_for_cpu_offload_groups",
        "temp_grad_buffer_for_cpu_offload",
        "accumulated_grads_in_cpu",
        "grad_partitions_flat_buffer",
    ),
}
"""Where DeepSpeed keeps what, if the optimizer's state is in host memory."""


def most_if_offloaded(case: Case) -> tuple[int, int]:
    """On every rank: most bytes of gradients on the device, and of all that is for the host."""
    most: Counter[str] = Counter()

    def note(engine: Engine) -> None:
        zero, parameters = engine.deepspeed.optimizer, list(engine.model.parameters())
        found = {
            part: num_bytes([getattr(zero, name, None) for name in names])
            for part, names in HELD_BY_ZERO.items()
        }
        flats = tensors_in([getattr(zero, name, None) for name in HELD_BY_ZERO["masters"]])
        found |= {
            "whole": num_bytes([(p.grad, getattr(p, "grad_accum", None)) for p in parameters]),
            "gradients": num_bytes([flat.grad for flat in flats]),
            "moments": num_bytes([engine.optimizer.state[p] for p in engine.optimizer.state]),
        }
        most.update({n: max(0, size - most[n]) for n, size in found.items()})

    during_steps(case, make_mesh(case.expert_parallel), note)
    on_device = sum(most[part] for part in ("sums", "of the device", "whole"))
    return on_device, most.total() - on_device


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_predicted_states_if_the_optimizer_is_offloaded(pools, zero_stage, precision, micro_batch):
    case = Case(
        world_size=4,
        zero_stage=zero_stage,
        precision=precision,
        micro_batch=micro_batch,
        optimizer="adamw",
        offload="host",
    )
    held = states_of(case)
    found = pools(4).run(most_if_offloaded, case)
    on_device, in_host_memory = (max(sizes) for sizes in zip(*found, strict=True))
    assert on_device == total(held.gradients)
    assert in_host_memory == held.host_total(is_pinned=False)
    assert held.total == total(held.parameters) + total(held.gradients)


def predicted(case: Case) -> dict[str, int]:
    return {name: total(lines) for name, lines in states_of(case).parts().items()}


def states_of(case: Case) -> States:
    config = case.config()
    return states(
        sizes_of(meta_model(config.model), case.expert_parallel),
        layout_of(config, case.world_size, config.parallel.expert_exchange),
        case.zero_stage,
        config.optimizer,
        AS_IF_LARGE,
    )


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_predicted_states_are_those_of_one_of_1024_ranks(zero_stage):
    """DeepSpeed's world is that of a process, so this takes one of its own."""
    experts = {"kind": "moe", "d_expert": 8, "router": router(70, 2)}
    attention = SWITCHHEAD | {"router": router(40, 2)}
    case = Case(
        world_size=1024,
        expert_parallel=64,
        zero_stage=zero_stage,
        precision="bf16",
        micro_batch=1,
        sequences=2048,
        padded=False,
        optimizer="adamw",
        model={"attention": attention, "ffn": experts},
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as process:
        found = process.submit(among_mirror_images, case).result(timeout=TIMEOUT_S)
    assert found == predicted(case)
