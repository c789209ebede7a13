"""What shipped configurations launch on a GPU, as Triton specializes it.

Models run forward and backward on the fake GPU of `tests.fake_cuda`, in the type, with the
micro-batch and with the padding that a job has. Kernels are recorded in place of being launched,
so whoever imports this must not have Triton interpret them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from moa_dist.config import load_config
from moa_dist.config.run import Config
from moa_dist.distributed.pending import ready
from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.row_map import ExpertWeights, Rows
from moa_dist.kernels.segment_sum import gather_rows, sum_rows
from moa_dist.models import recursion
from moa_dist.models.language_model import meta_model
from moa_dist.models.objective import objective
from moa_dist.moe.dispatch import Assignments, LocalPlan
from moa_dist.moe.experts import shard_starts
from moa_dist.moe.routed_module import RoutedModule, RoutedProjection, routed_modules
from tests.fake_cuda.launches import Launches, fake_cuda
from tests.fake_cuda.training_step import micro_batch

META = torch.device("meta")
PADDED = {"masked", "translation"}
"""Objectives whose batches have masks of padding."""


@dataclass(frozen=True)
class Specialization:
    """A kernel with all that its machine code depends on."""

    kernel: JITFunction = field(compare=False)
    name: str
    key: str
    """What distinguishes it from others of the same kernel."""
    source: ASTSource = field(compare=False)
    options: dict[str, Any] = field(compare=False)

    @property
    def constants(self) -> dict[str, Any]:
        """Values that the kernel was compiled for, by the name of the argument."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}


def backend_of(capability: tuple[int, int]) -> BaseBackend:
    return CUDABackend(target_of(capability))


def target_of(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def specialize(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], backend: BaseBackend
) -> Specialization:
    """Determine what Triton would compile for this launch."""
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, rest
    )
    key = f"{signature} {constants} {attributes} {options.num_warps} {options.num_stages}"
    source = ASTSource(kernel, signature, constants, attributes)
    return Specialization(kernel, kernel.__name__, key, source, vars(options))


class Recorder(Launches):
    """Records distinct specializations; its subclasses say for which GPU."""

    backend: BaseBackend

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Specialization, None] = {}

    def triton(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().triton(kernel, args, kwargs)
        self.found[specialize(kernel, args, kwargs, self.backend)] = None


def specializations(path: Path, capability: tuple[int, int]) -> list[Specialization]:
    """Return what training with the configuration at `path` launches, each once."""
    config = load_config(path)
    recorder = type("_Recorder", (Recorder,), {"backend": backend_of(capability)})
    with fake_cuda(Hardware("cuda", capability=capability), recorder) as record:
        launches = record()
        train(config, launches)
        if config.parallel.expert_parallel > 1:
            with launches:
                exchange(config)
    return list(launches.found)


def train(config: Config, launches: Launches) -> None:
    """Run one micro-batch with all experts on one rank."""
    model = meta_model(config.model, recompute=config.train.recompute)
    cast(model, config)
    batch = micro_batch(
        model.train(),
        config.train.micro_batch,
        config.data.sequence_length,
        padded=config.model.objective in PADDED,
    )
    with launches, mock.patch.object(recursion, "longest", all_places):
        objective(model, batch).loss(1.0).backward()


def all_places(kept: Tensor) -> list[int]:
    """Let every token recur, as a fake device does not say which do."""
    return [kept.shape[2]] * len(kept)


def cast(model: nn.Module, config: Config) -> None:
    """Give parameters the type in which a job computes; buffers keep theirs."""
    if config.train.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)


def exchange(config: Config) -> None:
    """Run the routed projections of a rank's shard, as if it received as many rows as it sent.

    How many those are is known on the host, so no fake device can run the exchange itself.
    """
    model = meta_model(config.model)
    cast(model, config)
    num_tokens = config.train.micro_batch * config.data.sequence_length
    for _, module in routed_modules(model):
        for projection in module.routed_projections():
            run_shard(module, projection, num_tokens, config.parallel.expert_parallel)


def run_shard(
    module: RoutedModule, projection: RoutedProjection, num_tokens: int, num_ranks: int
) -> None:
    router, layers = module.router_of(projection), module.expert_layers()
    G, K = router.num_groups, router.config.top_k
    num_rows = {"token": num_tokens, "group": num_tokens * G, "slot": num_tokens * G * K}
    first, last = shard_starts(router.num_experts, num_ranks)[:2]
    *ups, down = (layers[name].weight[: last - first] for name in projection.experts)
    experts = ExpertWeights(down, tuple(ups), getattr(module.config, "activation", "relu"))

    def ints(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int64, device=META)

    slots = num_rows["slot"]
    arrived = Assignments(
        expert=ints(slots),
        weight=torch.empty(slots, device=META, requires_grad=True),
        rows={level: ints(slots) for level in num_rows},
        num_rows=num_rows,
        is_dropless=True,
        starts={level: ints(num_rows[level] + 1) for level in ("token", "group")},
    )
    plan = LocalPlan.of(arrived, last - first)
    sent, returned = (
        Rows(ints(num_rows[level]), ints(num_rows[level]), ints(num_rows[level] + 1), num)
        for level, num in (
            (projection.read, num_rows[projection.read]),
            (projection.write, num_rows[projection.write]),
        )
    )
    x = down.new_empty(num_rows[projection.read], projection.d_in, requires_grad=True)
    rows = ready(gather_rows(x, sent))
    read, write, weighted = projection.read, projection.write, projection.weighted
    y = plan.run_and_combine(experts, rows, read, write, weighted=weighted).wait()
    sum_rows(y, returned).sum().backward()
