"""No step in bf16 adds rows one by one in bf16, which on a GPU is also in no fixed order."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moa_dist.distributed.mesh import make_mesh
from moa_dist.kernels import routed_experts as kernels
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import AS_IF_LARGE, MOA, Case, micro_batches, router

ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_reduce", "scatter_reduce"}
INDEXED = {"index_put", "index_put_", "_index_put_impl_"}
NARROW = (torch.bfloat16, torch.float16)


class NarrowSums(TorchDispatchMode):
    """Notes all operations that add rows of a narrow type to rows of that type.

    The gradient of the embedding is torch's own operation, on rows that were widened on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        accumulates = name in INDEXED and len(args) > 3 and args[3]
        if (name in ADDS or accumulates) and args[0].dtype in NARROW:
            self.found.append(f"{name} {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def narrow_sums(case: Case) -> list[str]:
    """Runs on every rank of a pool: sums in narrow types during a step, by the kernel of GPUs."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    exchange = config.parallel.expert_exchange
    shard = partial(shard_experts, mesh=mesh, exchange=exchange, overlap=case.overlap)
    model = build_model(config.model, recompute=case.recompute, parallelize=shard)

    def grouped(*_: Any) -> kernels.Kernel:
        return kernels._GROUPED

    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    with mock.patch.object(kernels, "kernel_for", grouped), NarrowSums() as sums:
        engine.step(micro_batches(case, mesh), lr=1e-2)
    engine.close()
    return sums.found


MODELS: dict[str, dict[str, Any]] = {
    "switchhead": {},
    "moa": {
        "attention": MOA | {"router": router(6, 3, "softmax")},
        "ffn": {"kind": "moe", "d_expert": 8, "router": router(5, 2)},
        "tie_embeddings": True,
    },
}
LAYOUTS = {
    "ep 1": Case(expert_parallel=1),
    "tokens": Case(overlap=True),
    "weights": Case(exchange="weights"),
    "tokens, recomputed": Case(recompute=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_no_rows_are_added_in_a_narrow_type(pools, layout, model):
    fields = vars(LAYOUTS[layout]) | {"model": MODELS[model], "zero_stage": 2, "precision": "bf16"}
    assert pools(2).run(narrow_sums, Case(**fields)) == [[], []]


def test_a_narrow_sum_is_found():
    x = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([0, 0, 2])
    for gather in (lambda: x.index_select(0, rows), lambda: x[rows]):
        with NarrowSums() as sums:
            gather().sum().backward()
        assert len(sums.found) == 1


class NarrowTerms(TorchDispatchMode):
    """Notes where autograd adds gradients of a narrow type that have the shape of a weight.

    Under a mode it adds them out of place, unlike gradients of micro-batches.
    """

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        if name == "add" and result.dtype in NARROW and result.shape in self.shapes:
            self.found.append(f"{name} {tuple(result.shape)}")
        return result


def narrow_terms(case: Case) -> list[str]:
    """Runs on every rank of a pool: sums of weights' gradients in narrow types during a step."""
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    exchange = config.parallel.expert_exchange
    shard = partial(shard_experts, mesh=mesh, exchange=exchange, overlap=case.overlap)
    model = build_model(config.model, recompute=case.recompute, parallelize=shard)
    whole = build_model(config.model)
    parameters = (*model.parameters(), *whole.parameters())
    shapes = {parameter.shape for parameter in parameters}
    engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    with NarrowTerms(shapes) as terms:
        engine.step(micro_batches(case, mesh), lr=1e-2)
    engine.close()
    return terms.found


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_no_gradients_of_repeats_are_added_in_a_narrow_type(pools, layout, model, zero_stage):
    fields = vars(LAYOUTS[layout]) | {
        "model": MODELS[model],
        "zero_stage": zero_stage,
        "precision": "bf16",
        "micro_batch": 1,
    }
    assert pools(2).run(narrow_terms, Case(**fields)) == [[], []]
