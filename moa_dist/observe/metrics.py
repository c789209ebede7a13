"""What the training loop reports, as values, and who may listen.

The loop never prints: it hands these to observers (see `moa_dist.observe`), on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moa_dist.config.run import Config
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.stack import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.provenance import Provenance


@dataclass(frozen=True)
class RunStart:
    """Said once, before the first step."""

    config: Config
    """The resolved configuration."""
    folder: str
    """The run's folder."""
    world_size: int
    """Ranks (W)."""
    device: str
    """What every rank computes on, such as `cpu` or `cuda (NVIDIA H100)`."""
    backend: str
    """Communication backend: `nccl` or `gloo`."""
    num_parameters: int
    """Of the whole model."""
    num_active_parameters: int
    """Of those, how many one token uses."""
    flops_per_token: float
    """Model FLOPs of one token, forward and backward, without recomputation."""
    first_step: int
    """0, or the step that training resumes after."""
    provenance: Provenance
    """Sources, packages and image."""
    excluded_shards: int = 0
    """Damaged training shards that are left out of the order of samples."""
    exchange: Mapping[str, str] = field(default_factory=dict)
    """Part of a layer -> what travels between ranks for its experts, and why."""
    overlap: bool = False
    """It travels while other things are computed."""


@dataclass(frozen=True)
class RankTime:
    """What a rank needs for its own part of a step."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Where it runs."""
    seconds: float
    """Per step: reading and computing, without waiting for other ranks."""


@dataclass(frozen=True)
class Timing:
    """Where the time since the last report went, validation and checkpoints apart."""

    step_seconds: float
    """Per step, mean over ranks."""
    communication_share: float
    """Of that, the share in which ranks waited in collectives. What computation overlaps is not
    in it; waiting for a slower rank is."""
    slowest: RankTime
    """The rank with most work, for which the others wait."""
    fastest: RankTime
    """The rank with least."""

    @staticmethod
    def of(work: Sequence[float], wait: Sequence[float], hosts: Sequence[str]) -> Timing:
        """From every rank's seconds of work and of waiting per step."""
        ranks = [RankTime(*entry) for entry in zip(range(len(work)), hosts, work, strict=True)]
        total = sum(work) + sum(wait)
        return Timing(
            step_seconds=total / len(ranks),
            communication_share=sum(wait) / total,
            slowest=max(ranks, key=lambda rank: rank.seconds),
            fastest=min(ranks, key=lambda rank: rank.seconds),
        )


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; sums and means run over all ranks and micro-batches."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean cross-entropy per target token, nats."""
    aux_losses: dict[str, float]
    """Auxiliary losses by name, coefficients applied."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of this step."""
    samples: int
    """Sequences consumed so far, this step's included; its own are the last `global_batch`."""
    digest: str
    """Of this step's token ids: equal for equal global batches, in any layout."""
    tokens: int
    """Target tokens of this step."""
    tokens_per_second: float
    """Over the steps since the last report, all ranks together."""
    timing: Timing
    """Over the same steps."""
    routing: dict[RouterCall, RoutingReport]
    """One entry per router application; on the CPU. Empty for dense models."""
    traffic: dict[TrafficKey, TrafficVolume]
    """What ranks sent each other for experts in this step, and at ZeRO 0 for gradients."""
    gpu: Mapping[str, float] = field(default_factory=dict)
    """Readings of rank 0's device by name with unit; empty for a CPU."""


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation."""

    step: int
    """Steps taken so far."""
    loss: float
    """Mean cross-entropy per target token, nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Cross-entropy in bits per byte of the text; None for masked language models."""
    tokens: int
    """Target tokens it runs over."""


class Observer(Protocol):
    """Listens to a training run."""

    def start(self, run: RunStart) -> None:
        """Before the first step."""

    def step(self, metrics: StepMetrics) -> None:
        """Every `logging.every` steps."""

    def validation(self, metrics: ValidationMetrics) -> None:
        """After a validation."""

    def rewind(self, step: int) -> None:
        """Training goes back to after this step: what was reported of later ones is void."""

    def note(self, message: str) -> None:
        """Something a person should know, such as a saved checkpoint; one line."""

    def close(self) -> None:
        """After the last step, also when training fails."""
