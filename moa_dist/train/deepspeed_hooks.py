"""What DeepSpeed needs to know about expert parameters; for deepspeed 0.19.

DeepSpeed offers no public way to say "this parameter differs over the expert-parallel
ranks". Its engine looks for instances of its own layer classes, for groups in dictionaries of
`deepspeed.utils.groups`, and for attributes on parameters. This file provides the three, and
nothing else in the project touches them. With them, gradients of experts are summed over
the ranks that hold copies and divided by W, the norm counts every expert once, and ZeRO
partitions expert state over those ranks: `tests/distributed/test_engine.py` compares each
stage with one process, and fails should a later version read something else.

It also measures how long DeepSpeed waits in the collectives that it enters by itself, keeps the
host from waiting in every micro-batch, and lets ZeRO 3 run models that were written without it.

The host still waits in every update for the norm and, at ZeRO 2 in bf16, for whether gradients are
finite: it decides whether the update is taken, and has read the losses just before. With the
optimizer in host memory it waits for gradients in every micro-batch, since it reads them. ZeRO 3
also waits for its reductions in every micro-batch, and in layers for earlier gathers and
reductions, which keeps gathered parameters and gradients from piling up.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import deepspeed
import deepspeed.comm.comm as deepspeed_comm
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch import nn

from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.mesh import Mesh, expert_data_parallel_ranks, expert_parallel_ranks
from moa_dist.models.attention import Attention
from moa_dist.models.block import Block, CrossAttention
from moa_dist.models.feed_forward import FeedForward
from moa_dist.moe.routed_module import RoutedModule

_MARKER = "_deepspeed_expert_marker"
_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


def disable_shm_comm_jit() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on CPUs at start.

    That takes a minute, needs a compiler, and a process killed meanwhile leaves a lock file
    on which every later run hangs.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ignore_renamed_collectives() -> None:
    """Hide torch's warnings that collectives get new names, which users cannot do anything about.

    DeepSpeed 0.19 calls them by their old ones.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.expert_parallel}"


def register_groups(mesh: Mesh) -> None:
    """Make DeepSpeed use the mesh's groups, so that no second set of communicators exists."""
    name = _group_name(mesh)
    for of_group, of_ranks, group, ranks in (
        (
            groups._EXPERT_PARALLEL_GROUP,
            groups._EXPERT_PARALLEL_GROUP_RANKS,
            mesh.ep_group,
            expert_parallel_ranks,
        ),
        (
            groups._EXPERT_DATA_PARALLEL_GROUP,
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
            mesh.edp_group,
            expert_data_parallel_ranks,
        ),
    ):
        of_group[name] = group
        of_ranks[name] = next(
            r for r in ranks(mesh.world_size, mesh.expert_parallel) if dist.get_rank() in r
        )


def unregister_groups() -> None:
    """Remove the groups, so that another engine can be built in this process."""
    for of_group in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        of_group.clear()


def tag_expert_parameters(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Set the attributes that DeepSpeed reads from every expert parameter."""
    for parameter in parameters:
        tags: dict[str, Any] = {
            "allreduce": False,
            "group_name": _group_name(mesh),
            "ds_zero_placement_family": "autoep_expert",  # this and the next: ZeRO 3
            "ds_zero_partition_group_name": _group_name(mesh),
        }
        for key, value in tags.items():
            setattr(parameter, key, value)


def name_expert_groups(parameter_groups: Iterable[dict[str, Any]], mesh: Mesh) -> None:
    """Mark optimizer groups of experts in the way that ZeRO 1 and 2 look for."""
    for group in parameter_groups:
        if group["experts"]:
            group |= {"moe": True, "name": _group_name(mesh)}


def prepare_for_zero_3(model: nn.Module) -> None:
    """Let ZeRO 3's hooks, which run around calls of modules, serve modules written without it.

    They gather the parameters of a module when it is called, and nobody calls a `GroupedLinear`
    whose weights stay here: its `RoutedModule` uses them. And they replace tensors inside the
    dictionaries that a module is called with, while gathered weights serve every repeat of a layer
    and a part that is computed again.
    """
    gather_in_order()
    for module in model.modules():
        if isinstance(module, Block | Attention | CrossAttention | FeedForward):
            module.register_forward_pre_hook(_with_own_dictionaries)
        if isinstance(module, RoutedModule):
            for child in module.expert_layers().values():
                if child.gather is None:
                    deepspeed.zero.register_external_parameter(module, child.weight)


def gather_in_order() -> None:
    """Make ZeRO 3 gather the parameters of a module in the same order on every rank.

    DeepSpeed keeps them in a set, whose order follows addresses in memory. So ranks would gather
    dense and expert parameters, which have different groups, in different orders, and NCCL may
    deadlock when ranks enter the collectives of two groups in different orders.
    """
    gather = getattr(PartitionedParameterCoordinator, _GATHER)
    if hasattr(gather, "__wrapped__"):
        return

    @wraps(gather)
    def in_order(coordinator: Any, parameters: Iterable[Any], *args: Any, **keywords: Any) -> Any:
        ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
        return gather(coordinator, ordered, *args, **keywords)

    setattr(PartitionedParameterCoordinator, _GATHER, in_order)


def _with_own_dictionaries(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_copied(argument) for argument in args)


def _copied(value: Any) -> Any:
    """Copy a dictionary, also one in a named tuple."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    return value


def order_reductions_on_the_device(optimizer: Any) -> None:
    """Let micro-batches end at ZeRO 1 and 2 without a host-device synchronization.

    After the last reduction of a backward pass, DeepSpeed synchronizes the device, as the stream
    that computes reads the reduced gradients next, and buffers are freed. It is enough that each
    of the two streams waits for what the other has been given so far, unless the optimizer is in
    host memory: then the host reads gradients itself.
    """
    accelerator = get_accelerator()
    if accelerator.resolves_data_dependency() or not hasattr(optimizer, "reduction_stream"):
        return
    if optimizer.cpu_offload:
        return
    end = optimizer.independent_gradient_partition_epilogue

    def wait_for_each_other() -> None:
        computing, reducing = accelerator.current_stream(), optimizer.reduction_stream
        reducing.wait_stream(computing)
        computing.wait_stream(reducing)

    @wraps(end)
    def end_without_waiting() -> None:
        accelerator.synchronize = wait_for_each_other  # in front of the method of the class
        try:
            end()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = end_without_waiting


class _ExpertMarker(AutoEPMoELayer):
    """A layer without parameters that shows the engine that the model has experts."""

    def __init__(self, mesh: Mesh) -> None:
        nn.Module.__init__(self)  # not the parent's: it would build DeepSpeed's own layer
        self.ep_size = mesh.expert_parallel
        self.num_experts = mesh.expert_parallel
        self._mesh = mesh

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        register_groups(self._mesh)


@contextmanager
def expert_marker(model: nn.Module, mesh: Mesh, has_experts: bool) -> Iterator[None]:
    """Make `deepspeed.initialize(model=model)` see expert layers while open, if `has_experts`."""
    if not has_experts:  # it would look for an optimizer group of experts
        yield
        return
    model.add_module(_MARKER, _ExpertMarker(mesh))
    try:
        yield
    finally:
        delattr(model, _MARKER)


class _TimedBackend:
    """Wraps DeepSpeed's backend of collectives, and measures the time spent waiting.

    Its own log of collectives would wait for the device after each of them.
    """

    _TIMED = frozenset(
        {
            "all_gather",
            "all_gather_coalesced",
            "all_gather_into_tensor",
            "all_reduce",
            "all_reduce_coalesced",
            "all_to_all_single",
            "broadcast",
            "reduce",
            "reduce_scatter",
            "reduce_scatter_tensor",
        }
    )

    def __init__(self, backend: Any, comm_timer: CommTimer) -> None:
        self.backend = backend
        self._comm_timer = comm_timer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.backend, name)
        return partial(self._timed, name, value) if name in self._TIMED else value

    def _timed(self, name: str, function: Any, *args: Any, **keywords: Any) -> Any:
        what = f"{name} by ZeRO"
        with self._comm_timer.begin(what):
            work = function(*args, **keywords)
        return _TimedWork(work, self._comm_timer, what) if hasattr(work, "wait") else work


class _TimedWork:
    """Wraps the handle of an asynchronous collective."""

    def __init__(self, work: Any, comm_timer: CommTimer, what: str) -> None:
        self._work, self._comm_timer, self._what = work, comm_timer, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **keywords: Any) -> Any:
        with self._comm_timer.wait(self._what):
            return self._work.wait(*args, **keywords)


def time_collectives(comm_timer: CommTimer) -> None:
    """Measure the waiting in collectives that DeepSpeed enters by itself, for one engine."""
    restore_backend()
    deepspeed_comm.cdb = _TimedBackend(deepspeed_comm.cdb, comm_timer)


def restore_backend() -> None:
    """Restore DeepSpeed's backend."""
    if isinstance(deepspeed_comm.cdb, _TimedBackend):
        deepspeed_comm.cdb = deepspeed_comm.cdb.backend


def is_worth_showing(record: logging.LogRecord) -> bool:
    """Filter out two of DeepSpeed's lines.

    One reports an overflow for every step that we reject, also for finite ones, and we report
    these. The other warns of every optimizer but its own.
    """
    message = record.getMessage()
    return "OVERFLOW" not in message and "untested optimizer" not in message


def take_step(engine: Any) -> None:
    """Call `engine.step()`, and drop the gradients even if it skips the update.

    With its state in host memory, the optimizer of stages 1 and 2 would keep sums in fp32 of bf16
    gradients then, and add the next step's to them.
    """
    engine.step()
    optimizer = engine.optimizer
    if hasattr(optimizer, "norm_for_param_grads"):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


def discard_step(engine: Any) -> None:
    """Call `engine.step()` at ZeRO 1 to 3 so that it drops gradients and changes nothing else.

    DeepSpeed does so when their norm is not finite, and offers no other way to discard a step.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "norm_for_param_grads"):  # of gradients that are in host memory already
        for norm in optimizer.norm_for_param_grads.values():
            norm.fill_(math.nan)
        take_step(engine)
        return
    if hasattr(optimizer, "bf16_groups"):  # DeepSpeed's own class for bf16 at stage 1
        gradients = list(optimizer.fp32_groups_gradients_flat)
    else:
        gradients = [
            gradient
            for group in optimizer.averaged_gradients.values()
            for gradient in group or []
            if gradient is not None
        ]
    for gradient in gradients:
        gradient.fill_(math.nan)
    engine.step()
    for gradient in gradients:  # stage 3 uses them again, and does not write over their padding
        gradient.zero_()
