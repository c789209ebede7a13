"""The engine: DeepSpeed around a model whose experts are sharded; steps return values.

This is the only file that calls `deepspeed.initialize`. Shapes: W ranks, M micro-batches per rank.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.distributed.mesh import Mesh
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.errors import BadStepError, BadStepReason
from moa_dist.models.calls import RouterCall
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.objective import Batch, Objective, objective
from moa_dist.models.parameter_parts import parameter_parts
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.sharding import pool_statistics
from moa_dist.moe.statistics import RoutingReport, report_each, reports
from moa_dist.profiling import annotate
from moa_dist.train import deepspeed_hooks
from moa_dist.train.adapt import adapt_routers
from moa_dist.train.deepspeed_config import deepspeed_config
from moa_dist.train.engine_state import EngineState
from moa_dist.train.muon import Muon
from moa_dist.train.not_finite import first_not_finite, require_finite
from moa_dist.train.optimizer import make_optimizer, parameter_groups, set_learning_rate
from moa_dist.train.part_norms import measured_parts
from moa_dist.train.zero0 import reduce_and_clip

_SUM, _NUMBER = "sum over tokens of ", "number of tokens of "
"""Names of the two parts of a mean over tokens, which are summed over ranks with the losses."""


@dataclass(frozen=True)
class StepResult:
    """Global values of one optimizer step; only `routing` and `traffic` differ between ranks."""

    loss: float
    """Mean cross-entropy per target, nats."""
    aux_losses: dict[str, float]
    """Mean auxiliary losses over the sequences of the global batch; the z-loss over its targets."""
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Target tokens of all ranks."""
    tokens_read: int
    """Input tokens of all ranks without padding; more than `tokens` in a masked language model."""
    routing: dict[RouterCall, RoutingReport]
    """Routing reports, summed over this rank's micro-batches."""
    traffic: dict[TrafficKey, TrafficVolume]
    """What this rank sent for experts and, at ZeRO 0, for gradients."""
    part_squares: Tensor | None = None
    """What `measured_parts` yields on this rank, if it was to be measured."""
    token_means: dict[str, float] = field(default_factory=dict)
    """Means over the tokens of the global batch by name, such as `halting/applications`."""


class _Totals(NamedTuple):
    """Sizes of the global batch of a step."""

    targets: int
    """Target tokens; at least 1."""
    sequences: int
    """Sequences."""
    read: int
    """Input tokens without padding."""
    micro_batches: int
    """Micro-batches."""

    @property
    def targets_per_micro_batch(self) -> float:
        """Mean number of targets, by which each cross-entropy is divided."""
        return self.targets / self.micro_batches


class Engine:
    """Runs forward, backward and update of a sharded model under ZeRO stage 0 to 3."""

    def __init__(
        self,
        model: LanguageModel,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        zero_sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
    ) -> None:
        """Wrap `model`, whose experts `shard_experts` has sharded over `mesh`.

        Collective over all ranks.
        """
        self.mesh = mesh
        self.zero_stage = config.parallel.zero_stage
        self.clip_norm = config.optimizer.clip_norm
        self.label_smoothing, self.z_loss = config.train.label_smoothing, config.train.z_loss
        self.device = device
        self.expert_names = {f"{name}.weight" for name, _ in expert_layers(model)}
        model.sum_over_ranks = partial(pool_statistics, mesh=mesh)
        if config.train.precision == "fp64":
            model = model.double()

        experts = [p for name, p in model.named_parameters() if name in self.expert_names]
        deepspeed_hooks.tag_expert_parameters(experts, mesh)
        if self.zero_stage == 3:
            deepspeed_hooks.prepare_for_zero_3(model)
        groups = parameter_groups(model, config.optimizer, self.expert_names)
        deepspeed_hooks.name_expert_groups(groups, mesh)
        fused = device.type == "cuda" or config.optimizer.offload == "host"
        self.optimizer = make_optimizer(config.optimizer, groups, fused=fused)
        with deepspeed_hooks.expert_marker(model, mesh, bool(experts)):
            self.deepspeed = _initialize(model, self.optimizer, config, mesh, zero_sizes)
        deepspeed_hooks.order_reductions_on_the_device(self.deepspeed.optimizer)
        self.state = EngineState(self.deepspeed, self.optimizer, mesh, device, self.zero_stage)
        """The state that checkpoints save and restore."""
        if isinstance(self.optimizer, Muon):
            self.optimizer.set_partitions(list(self.state.matrix_partitions()))
        deepspeed_hooks.time_collectives(mesh.comm_timer)
        if self.zero_stage == 0:
            self.deepspeed.enable_backward_allreduce = False  # see zero0.py

    @property
    def model(self) -> LanguageModel:
        """The wrapped model."""
        module: LanguageModel = self.deepspeed.module
        return module

    def step(
        self,
        batches: Sequence[Batch],
        lr: float,
        loss_limit: float = math.inf,
        *,
        measure_parts: bool = False,
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches, and measure parts on request.

        Collective; every rank brings the same number of micro-batches of the same size.
        Raises BadStepError, with parameters and optimizer state untouched, if the loss or the
        gradient norm is not finite, or the loss is above `loss_limit`.
        """
        totals = self._totals(batches)  # on the host: counting on the device would wait for it
        batches = [batch.to(self.device) for batch in batches]
        self.deepspeed.train()
        self.mesh.traffic_counter.take()  # what evaluation has sent
        set_learning_rate(self.optimizer, lr)
        sums, routing = self._forward_and_backward(batches, totals)
        try:
            values = self._finite_values(sums, batches)
            loss, means = values.pop("cross_entropy") / totals.targets, _token_means(values)
            if loss > loss_limit:
                raise BadStepError(
                    f"the loss spikes: {loss:.4g} is above {loss_limit:.4g}",
                    BadStepReason.SPIKE,
                    {"loss": loss, "limit": loss_limit},
                )
        except BadStepError:
            self._discard_gradients()
            raise
        with annotate("optimizer"):
            with self._measured(measure_parts) as part_squares:
                grad_norm = self._update()
            adapt_routers(self.model.routers(), routing, self.mesh.comm_timer)
        self.mesh.comm_timer.settle()
        return StepResult(
            loss=loss,
            aux_losses={name: value / totals.micro_batches for name, value in values.items()},
            grad_norm=grad_norm,
            tokens=totals.targets,
            tokens_read=totals.read,
            routing=routing,
            traffic=self.mesh.traffic_counter.take(),
            part_squares=part_squares,
            token_means=means,
        )

    def _measured(self, measure_parts: bool) -> AbstractContextManager[Tensor | None]:
        if not measure_parts:
            return contextlib.nullcontext()
        ranges, parts = self.state.owned_ranges(), parameter_parts(self.model)
        return measured_parts(self.optimizer, ranges, parts, self.device)

    def _totals(self, batches: Sequence[Batch]) -> _Totals:
        """Count over all ranks; one collective."""
        own = [[b.num_targets(), b.num_sequences, b.num_read()] for b in batches]
        targets, sequences, read = self._sum_over_ranks(
            torch.tensor(own).sum(0), "number of targets"
        ).tolist()
        targets = max(targets, 1)  # all tokens of a step may be padding, or none hidden
        return _Totals(targets, sequences, read, self.mesh.world_size * len(batches))

    def _forward_and_backward(
        self, batches: Sequence[Batch], totals: _Totals
    ) -> tuple[dict[str, Tensor], dict[RouterCall, RoutingReport]]:
        """Accumulate gradients; returns sums of this rank's losses and routing reports."""
        routing: dict[tuple[RouterCall, ...], RoutingReport] = {}
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            result = objective(self.deepspeed, batch, self.label_smoothing, self.z_loss)
            weight = batch.num_sequences * totals.micro_batches / totals.sequences
            # DeepSpeed divides by the number of micro-batches and averages over ranks.
            with annotate("backward"):
                self.deepspeed.backward(result.loss(totals.targets_per_micro_batch, weight))
            _add(sums, _values(result, weight, totals.targets_per_micro_batch))
            for calls, new in reports(result.statistics).items():
                routing[calls] = routing[calls].plus(new) if calls in routing else new
            if i < len(batches) - 1:
                self.deepspeed.step()
        return sums, report_each(routing)

    def _update(self) -> float:
        """Reduce, clip and take the step; returns the global gradient norm."""
        if self.zero_stage > 0:
            # It leaves the parameters alone if the norm is not finite.
            deepspeed_hooks.take_step(self.deepspeed)
            return require_finite(float(self.deepspeed.get_global_grad_norm()))
        norm = reduce_and_clip(self.model, self.expert_names, self.mesh, self.clip_norm)
        if not math.isfinite(norm):
            self._discard_gradients()
        else:
            self.deepspeed.step()
        return require_finite(norm)

    def _discard_gradients(self) -> None:
        """Drop the gradients; the next micro-batch is the first of a step."""
        if self.zero_stage == 0:
            for parameter in self.model.parameters():
                parameter.grad = None  # which the optimizer leaves out
            self.deepspeed.step()
        else:
            deepspeed_hooks.discard_step(self.deepspeed)

    def _finite_values(self, sums: dict[str, Tensor], batches: list[Batch]) -> dict[str, float]:
        """Sum over all ranks; one collective. Every rank raises if one value is not finite."""
        total = self._sum_over_ranks(torch.stack([v.double() for v in sums.values()]), "losses")
        values = dict(zip(sums, total.tolist(), strict=True))
        if bool(total.isfinite().all()):
            return values
        broken = {name: value for name, value in values.items() if not math.isfinite(value)}
        terms = ", ".join(f"{name} = {value}" for name, value in broken.items())
        first = first_not_finite(self.deepspeed, batches, self.mesh)
        raise BadStepError(
            f"the loss is not finite ({terms}); first seen in {first}", BadStepReason.LOSS, broken
        )

    def _sum_over_ranks(self, value: Tensor, what: str) -> Tensor:
        value = value.to(self.device)
        with self.mesh.comm_timer.begin(what):
            dist.all_reduce(value)
        return value

    def close(self) -> None:
        """Release DeepSpeed's hooks and groups."""
        self.deepspeed.destroy()
        deepspeed_hooks.restore_backend()
        deepspeed_hooks.unregister_groups()


def _initialize(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    mesh: Mesh,
    zero_sizes: ZeroSizes,
) -> Any:
    """Make DeepSpeed's engine, without compiling and without printing."""
    deepspeed_hooks.disable_shm_comm_jit()
    deepspeed_hooks.ignore_renamed_collectives()
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(deepspeed_hooks.is_worth_showing)
    largest = max(parameter.numel() for parameter in model.parameters())
    # Some of DeepSpeed's optimizers print their memory while they are built.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, mesh.world_size, largest, zero_sizes),
            dist_init_required=False,
        )
    return engine


def _values(result: Objective, weight: float, num_targets: float) -> dict[str, Tensor]:
    aux_losses = {name: weight * value for name, value in result.aux_losses.items()}
    if result.z is not None:
        aux_losses["logits/z_loss"] = result.z / num_targets
    values = {"cross_entropy": result.cross_entropy, **aux_losses}
    for name, sum_and_number in result.token_sums.items():
        values |= zip((_SUM + name, _NUMBER + name), sum_and_number, strict=True)
    return {name: value.detach() for name, value in values.items()}


def _token_means(values: dict[str, float]) -> dict[str, float]:
    """Take sums over tokens out of `values`, and divide them by the numbers of tokens."""
    names = [name.removeprefix(_SUM) for name in values if name.startswith(_SUM)]
    return {name: values.pop(_SUM + name) / max(values.pop(_NUMBER + name), 1) for name in names}


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value
