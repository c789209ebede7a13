"""Takes optimizer steps on one process, in plain torch, which every layout must reproduce.

It shares only the model with the engine: no DeepSpeed, no ranks, no micro-batches, and in fp64.
Shapes: T real tokens of the whole batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moa_dist.config.run import Config, OptimizerConfig
from moa_dist.models.calls import RouterCall, RouterKey
from moa_dist.models.cross_entropy import NO_TARGET
from moa_dist.models.language_model import LanguageModel, LanguageModelOutput, build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.adapt import StepLoad, adapt, adaptive
from moa_dist.moe.statistics import RoutingStatistics, own_sums
from moa_dist.verify.plain_optimizer import plain_optimizers


@dataclass(frozen=True)
class Outcome:
    """Holds the values of the whole model in one step, on the CPU."""

    initial: dict[str, Tensor]
    """Parameters, and selection biases if any, before the step, by name in model order."""
    logits: Tensor
    """Logits of the real tokens before the step, [T, V]."""
    loss: float
    """Mean cross-entropy per target."""
    aux_losses: dict[str, float]
    """Auxiliary losses by name."""
    load: dict[RouterCall, Tensor]
    """Assignments before dropping by router call, [G, E] int64."""
    dropped: dict[RouterCall, Tensor]
    """Dropped assignments by router call, [G, E] int64."""
    grad_norms: tuple[float, ...]
    """Gradient norm before clipping, as seen by each rank."""
    parameters: dict[str, Tensor]
    """Parameters after the step."""
    logits_after: Tensor
    """Logits of the updated model, [T, V]."""


def initial_model(config: Config) -> LanguageModel:
    """Build the whole model with the run's initial weights, in fp64."""
    return build_model(config.model, seed=config.train.seed).double()


def one_process(
    config: Config, batches: Sequence[Batch], optimizer: OptimizerConfig, lr: float
) -> Outcome:
    """Take one step over each global batch; returns the values of the last step."""
    model = initial_model(config)
    updates = plain_optimizers(model, optimizer, lr)
    for batch in batches:
        outcome = _step(config, model, batch, updates, optimizer.clip_norm)
    return outcome


def _step(
    config: Config,
    model: LanguageModel,
    batch: Batch,
    updates: Sequence[torch.optim.Optimizer],
    clip_norm: float | None,
) -> Outcome:
    """Take a step on the whole batch at once, or by parts if balance losses are per micro-batch."""
    model.zero_grad()
    initial = _state(model)
    token_mask, labels = input_mask(batch), batch.labels()
    size = config.train.micro_batch if _balanced_by_parts(config) else batch.num_sequences
    parts = [
        batch.rows(slice(first, first + size)) for first in range(0, batch.num_sequences, size)
    ]
    evaluated = _evaluated(model, batch)
    outputs = [model(*part.inputs()) for part in parts]
    logits = torch.cat([output.logits for output in outputs])
    aux_losses = {
        name: torch.stack([output.aux_losses[name] for output in outputs]).mean()
        for name in outputs[0].aux_losses
    }
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=config.train.label_smoothing
    )
    if coefficient := config.train.z_loss:
        log_sums = logits[labels != NO_TARGET].logsumexp(-1)
        aux_losses["logits/z_loss"] = coefficient * log_sums.square().mean()
    torch.stack([loss, *aux_losses.values()]).sum().backward()
    load, dropped = (_over_parts(outputs, count) for count in ("load", "dropped"))

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
    if clip_norm is not None:
        for gradient in gradients:
            gradient *= min(1.0, clip_norm / (norm + 1e-6))
    for update in updates:
        update.step()
    _adapt(model, outputs)
    return Outcome(
        initial=initial,
        logits=evaluated[token_mask],
        loss=loss.item(),
        aux_losses={name: value.item() for name, value in aux_losses.items()},
        load=load,
        dropped=dropped,
        grad_norms=(norm,),
        parameters=_state(model),
        logits_after=_evaluated(model, batch)[token_mask],
    )


@torch.no_grad()
def _evaluated(model: LanguageModel, batch: Batch) -> Tensor:
    """Compute logits in evaluation mode, where some routers choose otherwise than in training."""
    model.eval()
    logits: Tensor = model(*batch.inputs()).logits
    model.train()
    return logits


def input_mask(batch: Batch) -> Tensor:
    """Return the mask of real tokens among those that the model reads, [B, S] bool."""
    tokens, token_mask, *_ = batch.inputs()
    assert tokens is not None
    return torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask


def _over_parts(outputs: list[LanguageModelOutput], count: str) -> dict[RouterCall, Tensor]:
    """Sum a statistic over parts: [G, E] by router call."""
    by_part = [{s: getattr(v, count).sum(0) for s, v in o.statistics.items()} for o in outputs]
    return {call: torch.stack([part[call] for part in by_part]).sum(0) for call in by_part[0]}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _balanced_by_parts(config: Config) -> bool:
    """Return whether some balance loss is defined per micro-batch."""
    routers = config.model.routers().values()
    return any(router.balance.scope == "micro_batch" for router in routers)


def _adapt(model: LanguageModel, outputs: list[LanguageModelOutput]) -> None:
    """Adapt routers to the load of the step, counted anew from its statistics."""
    steps: dict[RouterKey, StepLoad] = {}
    for output in outputs:
        for call, value in output.statistics.items():
            pairs = value.num_tokens.sum() * value.load.shape[1]
            step = StepLoad(value.load.sum(0), pairs, own_sums(value))
            steps[call.key] = steps[call.key].plus(step) if call.key in steps else step
    adapt(adaptive(model.routers()), steps)


def is_clear_of_rounding(
    config: Config, batch: Batch, parameters: dict[str, Tensor], seed: int
) -> bool:
    """Return whether routing is unchanged when `parameters` change by about fp32's precision.

    The choice of experts is discontinuous: if two scores are equal up to rounding, layouts may
    legitimately choose differently.
    """
    model = initial_model(config)
    before = _routing(model, parameters, batch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        disturbed = {
            name: value * (1 + 1e-6 * torch.randn(value.shape, generator=generator))
            for name, value in parameters.items()
        }
        after = _routing(model, disturbed, batch)
        for call, ours in before.items():
            theirs = after[call]
            if not ours.load.equal(theirs.load) or not ours.dropped.equal(theirs.dropped):
                return False
    return True


@torch.no_grad()
def _routing(
    model: nn.Module, parameters: dict[str, Tensor], batch: Batch
) -> dict[RouterCall, RoutingStatistics]:
    output: LanguageModelOutput = functional_call(model, parameters, batch.inputs())
    return output.statistics
