"""The engine: DeepSpeed around a model whose experts are sharded. Optimizer steps as values.

The only file that calls `deepspeed.initialize`. Shapes: W ranks, M micro-batches per rank.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from moa_dist.config.run import Config
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.distributed.mesh import Mesh
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.errors import BadStepError
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.objective import Batch, Objective, objective
from moa_dist.models.stack import RouterCall
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.sharding import pool_statistics
from moa_dist.moe.statistics import RoutingReport, report
from moa_dist.profiling import annotate
from moa_dist.train import deepspeed_hooks
from moa_dist.train.biases import update_biases
from moa_dist.train.deepspeed_config import deepspeed_config
from moa_dist.train.engine_state import EngineState
from moa_dist.train.optimizer import make_optimizer


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: global values, equal on every rank, but for `routing`."""

    loss: float
    """Mean cross-entropy per target, nats."""
    aux_losses: dict[str, float]
    """Mean auxiliary losses over the sequences of the global batch."""
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Targets of all ranks."""
    tokens_read: int
    """Of all ranks, padding left out: as many unless some were hidden to be predicted."""
    routing: dict[RouterCall, RoutingReport]
    """Sums over this rank's micro-batches."""
    traffic: dict[TrafficKey, TrafficVolume]
    """What this rank sent for experts, and at ZeRO 0 for gradients."""


class Engine:
    """Forward, backward and update of a sharded model under ZeRO stage 0 to 3."""

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
        self.label_smoothing = config.train.label_smoothing
        self.device = device
        self.expert_names = {f"{name}.weight" for name, _ in expert_layers(model)}
        model.sum_over_ranks = partial(pool_statistics, mesh=mesh)
        if config.train.precision == "fp64":
            model = model.double()

        deepspeed_hooks.disable_shm_comm_jit()
        deepspeed_logger.setLevel(logging.WARNING)
        experts = [p for name, p in model.named_parameters() if name in self.expert_names]
        deepspeed_hooks.tag_expert_parameters(experts, mesh)
        if self.zero_stage == 3:
            deepspeed_hooks.prepare_for_zero_3(model)
        self.optimizer = make_optimizer(
            config.optimizer, deepspeed_hooks.parameter_groups(model, self.expert_names, mesh)
        )
        # Some of DeepSpeed's optimizers print their memory while they are built.
        silence = contextlib.redirect_stdout(io.StringIO())
        with deepspeed_hooks.expert_marker(model, mesh, bool(experts)), silence:
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=deepspeed_config(
                    config,
                    mesh.world_size,
                    max(parameter.numel() for parameter in model.parameters()),
                    zero_sizes,
                ),
                dist_init_required=False,
            )
        self.state = EngineState(self.deepspeed, self.optimizer, mesh, device, self.zero_stage)
        """What checkpoints hold of it."""
        deepspeed_hooks.time_collectives(mesh.comm_timer)
        if self.zero_stage == 0:
            self.deepspeed.enable_backward_allreduce = False  # see _reduce_and_clip

    @property
    def model(self) -> LanguageModel:
        """The wrapped model."""
        module: LanguageModel = self.deepspeed.module
        return module

    def step(self, batches: Sequence[Batch], lr: float, loss_limit: float = math.inf) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Collective; every rank brings the same number of micro-batches of the same size.
        Raises BadStepError, with parameters and optimizer state untouched, if the loss or the
        gradient norm is not finite, or the loss is above `loss_limit`.
        """
        batches = [batch.to(self.device) for batch in batches]
        own = [[b.num_targets(), b.num_sequences, b.num_read()] for b in batches]
        num_targets, num_sequences, num_read = self._sum_over_ranks(
            torch.tensor(own).sum(0), "number of targets"
        ).tolist()
        num_targets = max(num_targets, 1)  # all tokens of a step may be padding, or none hidden
        num_micro_batches = self.mesh.world_size * len(batches)
        per_micro_batch = num_targets / num_micro_batches
        self.deepspeed.train()
        self.mesh.traffic_counter.take()  # what evaluation has sent
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        routing: dict[RouterCall, RoutingReport] = {}
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            result = objective(self.deepspeed, batch, self.label_smoothing)
            weight = batch.num_sequences * num_micro_batches / num_sequences
            # DeepSpeed divides by the number of micro-batches and averages over ranks.
            with annotate("backward"):
                self.deepspeed.backward(result.loss(per_micro_batch, weight))
            _add(sums, _values(result, weight))
            _add_reports(routing, result.statistics)
            if i < len(batches) - 1:
                self.deepspeed.step()
        try:
            values = self._finite_values(sums, batches)
            loss = values.pop("cross_entropy") / num_targets
            if loss > loss_limit:
                raise BadStepError(f"the loss spikes: {loss:.4g} is above {loss_limit:.4g}")
        except BadStepError:
            self._discard_gradients()
            raise
        with annotate("optimizer"):
            grad_norm = self._update()
            update_biases(self.model.routers(), routing, self.mesh.comm_timer)
        self.mesh.comm_timer.settle()
        aux_losses = {name: value / num_micro_batches for name, value in values.items()}
        return StepResult(
            loss,
            aux_losses,
            grad_norm,
            int(num_targets),
            int(num_read),
            routing,
            self.mesh.traffic_counter.take(),
        )

    def _update(self) -> float:
        """Reduce, clip and take the step; returns the global gradient norm."""
        if self.zero_stage > 0:
            self.deepspeed.step()  # which leaves the parameters alone if the norm is not finite
            return _finite(float(self.deepspeed.get_global_grad_norm()))
        norm = float(self._reduce_and_clip())
        if not math.isfinite(norm):
            self._discard_gradients()
        else:
            self.deepspeed.step()
        return _finite(norm)

    def _discard_gradients(self) -> None:
        """Forget the gradients; the next micro-batch is the first of a step."""
        if self.zero_stage == 0:
            for parameter in self.model.parameters():
                parameter.grad = None  # which the optimizer leaves out
            self.deepspeed.step()
        else:
            deepspeed_hooks.discard_step(self.deepspeed)

    def _reduce_and_clip(self) -> Tensor:
        """Average gradients over ranks, clip them by their global norm, return that norm.

        For stage 0, where DeepSpeed averages the norms of the ranks, though each holds other
        experts, and refuses fp64. An expert's gradient already sums over its ep group, by way
        of the all-to-all: sum over its copies, then divide by W like all others.
        """
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:  # the same on every rank: no parameter depends on data
                continue
            (experts if name in self.expert_names else dense).append(parameter.grad)
        squares = []
        for gradients, group in ((dense, None), (experts, self.mesh.edp_group)):
            flat = torch.cat(
                [g.flatten() for g in gradients] or [torch.zeros(0, device=self.device)]
            )
            key = TrafficKey("experts" if group else "dense", "reduce", backward=True)
            with self.mesh.comm_timer.begin(key):
                dist.all_reduce(flat, group=group)
            num_ranks = dist.get_world_size(group)
            self.mesh.traffic_counter.add(key, 2 * (num_ranks - 1) * flat.nbytes // num_ranks)
            flat /= self.mesh.world_size
            squares.append(flat.double().square().sum())
            parts = flat.split([g.numel() for g in gradients])
            for gradient, average in zip(gradients, parts, strict=True):
                gradient.copy_(average.view_as(gradient))
        with self.mesh.comm_timer.begin("norm of expert gradients"):
            dist.all_reduce(squares[1], group=self.mesh.ep_group)
        norm = (squares[0] + squares[1]).sqrt()
        if self.clip_norm is not None:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1)
            for gradient in (*dense, *experts):
                gradient.mul_(factor)
        return norm

    def _finite_values(self, sums: dict[str, Tensor], batches: list[Batch]) -> dict[str, float]:
        """Sums over all ranks; one collective. Every rank raises if one value is not finite."""
        total = self._sum_over_ranks(torch.stack([v.double() for v in sums.values()]), "losses")
        values = dict(zip(sums, total.tolist(), strict=True))
        if bool(total.isfinite().all()):
            return values
        broken = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        first = self._first_not_finite(batches)
        raise BadStepError(f"the loss is not finite ({broken}); first seen in {first}")

    def _first_not_finite(self, batches: list[Batch]) -> str:
        """Name the first module, and its rank, whose output is not finite. Collective."""
        found: list[str] = []

        def check(name: str, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and not all(bool(t.isfinite().all()) for t in floats):
                found.append(name or "the model's output")

        handles = [
            module.register_forward_hook(lambda _m, _i, output, name=name: check(name, output))
            for name, module in self.model.named_modules()
        ]
        with torch.no_grad():
            for batch in batches:
                objective(self.deepspeed, batch)
        for handle in handles:
            handle.remove()
        everywhere: list[str | None] = [None] * self.mesh.world_size
        dist.all_gather_object(everywhere, found[0] if found else None)
        named = [f"{name} on rank {rank}" for rank, name in enumerate(everywhere) if name]
        return "; ".join(named) or "the loss itself"

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


def _finite(grad_norm: float) -> float:
    """The norm, equal on every rank; raises BadStepError if it is not finite."""
    if not math.isfinite(grad_norm):
        raise BadStepError(
            f"the loss is finite, but the gradient norm is {grad_norm}: lower optimizer.lr or the "
            "auxiliary coefficients, warm up for longer, or train in fp32 to see where it starts"
        )
    return grad_norm


def _values(result: Objective, weight: float) -> dict[str, Tensor]:
    aux_losses = {name: weight * value for name, value in result.aux_losses.items()}
    values = {"cross_entropy": result.cross_entropy, **aux_losses}
    return {name: value.detach() for name, value in values.items()}


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _add_reports(
    routing: dict[RouterCall, RoutingReport], statistics: dict[RouterCall, Any]
) -> None:
    for call, value in statistics.items():
        new = report(value)
        if call in routing:
            new = RoutingReport(*(a + b for a, b in zip(routing[call], new, strict=True)))
        routing[call] = new
