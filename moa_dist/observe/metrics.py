"""The values that the training loop reports, and the interface of its observers.

The loop never prints: it passes these values to observers (see `moa_dist.observe`) on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from moa_dist.config.run import Config
from moa_dist.data.epochs import SourceRead
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.calls import RouterCall, RouterKey
from moa_dist.moe.statistics import RoutingReport
from moa_dist.provenance import Provenance


class RouterSize(NamedTuple):
    """How many experts a router chooses among, and how many it chooses in training."""

    groups: int
    """Router groups (G): heads in SwitchHead, else 1."""
    experts: int
    """Experts per router group (E)."""
    choices: int
    """Experts chosen per token and router group (K), in the mean."""


@dataclass(frozen=True)
class RunStart:
    """Describes the run; reported once, before the first step."""

    config: Config
    """The resolved configuration."""
    folder: str
    """The run's folder."""
    world_size: int
    """Number of ranks (W)."""
    device: str
    """Device of every rank, such as `cpu` or `cuda (NVIDIA H100)`."""
    backend: str
    """Communication backend: `nccl` or `gloo`."""
    num_parameters: int
    """Parameters of the whole model."""
    num_active_parameters: int
    """Parameters that one token uses in training."""
    flops_per_token: float
    """Model FLOPs of one token in training, forward and backward, without recomputation."""
    first_step: int
    """0, or the step that training resumes after."""
    provenance: Provenance
    """Sources, packages and container image."""
    first_sample: int = 0
    """Sequences consumed before the next step; batches may have had other sizes."""
    changes: Sequence[JsonValue] = ()
    """What resuming has changed in the configuration, each with the step it follows."""
    excluded_shards: int = 0
    """Number of damaged training shards that are excluded from the order of samples."""
    exchange: Mapping[str, str] = field(default_factory=dict)
    """Part of a layer -> what ranks exchange for its experts (tokens or weights), and why."""
    overlap: bool = False
    """Whether this exchange overlaps with computation."""
    hosts: Sequence[str] = ()
    """Name of the machine of every rank, in rank order."""
    routers: Mapping[str, RouterSize] = field(default_factory=dict)
    """Sizes of the routers by their name within a layer, such as `ffn`."""
    mean_names: Mapping[RouterKey, Sequence[str]] = field(default_factory=dict)
    """Names of the means that routers report, see `RoutingReport`."""


@dataclass(frozen=True)
class RankTime:
    """The time that a rank needs for its own part of a step."""

    rank: int
    """0 ... W - 1."""
    host: str
    """Name of the machine it runs on."""
    seconds: float
    """Seconds of reading and computing per step, without waiting for other ranks."""


@dataclass(frozen=True)
class Timing:
    """How time was spent since the last report, excluding validation and checkpoints."""

    step_seconds: float
    """Seconds per step, mean over ranks."""
    communication_share: float
    """Share of this time in which ranks waited in collectives. It excludes communication that
    overlaps with computation, and includes waiting for a slower rank."""
    slowest: RankTime
    """The rank with the most work, which the others wait for."""
    fastest: RankTime
    """The rank with the least work."""

    @staticmethod
    def of(work: Sequence[float], wait: Sequence[float], hosts: Sequence[str]) -> Timing:
        """Combine every rank's seconds of work and of waiting per step."""
        ranks = [RankTime(*entry) for entry in zip(range(len(work)), hosts, work, strict=True)]
        total = sum(work) + sum(wait)
        return Timing(
            step_seconds=total / len(ranks),
            communication_share=sum(wait) / total,
            slowest=max(ranks, key=lambda rank: rank.seconds),
            fastest=min(ranks, key=lambda rank: rank.seconds),
        )


class PartNorms(NamedTuple):
    """How strongly one part of the model learns in a step."""

    grad_norm: float
    """Norm of its gradient before clipping."""
    update_ratio: float
    """Norm of its update, relative to that of its weights before; NaN if it was not measured."""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step; sums and means run over all ranks and micro-batches."""

    step: int
    """Number of the step, counted from 1."""
    loss: float
    """Mean cross-entropy per target token, nats."""
    aux_losses: dict[str, float]
    """Auxiliary losses by name, multiplied by their coefficients."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step."""
    samples: int
    """Sequences consumed so far; the last `global_batch` of them belong to this step."""
    digest: str
    """Hash of this step's token ids: equal for equal global batches, in any layout."""
    tokens: int
    """Target tokens of this step."""
    tokens_read: int
    """Input tokens without padding that all steps so far have read, those of rejected ones
    excluded."""
    tokens_per_second: float
    """Throughput of all ranks together over the steps since the last report."""
    timing: Timing
    """Timing over the same steps."""
    routing: dict[RouterCall, RoutingReport]
    """One entry per router application, on the CPU. Empty for dense models."""
    traffic: dict[TrafficKey, TrafficVolume]
    """What all ranks sent for experts in this step and, at ZeRO 0, for gradients."""
    sources: Mapping[str, SourceRead] = field(default_factory=dict)
    """What has been read so far of each source; empty for pairs."""
    gpu: Mapping[str, float] = field(default_factory=dict)
    """Readings of rank 0's device by name (with the unit); empty on a CPU."""
    parts: Mapping[str, PartNorms] = field(default_factory=dict)
    """Norms by part of the model; empty except every `logging.parts_every` steps."""
    token_means: Mapping[str, float] = field(default_factory=dict)
    """Means over tokens by name, such as `halting/applications`; empty for most models."""


@dataclass(frozen=True)
class ValidationMetrics:
    """Metrics of one validation pass."""

    step: int
    """Number of steps taken so far."""
    loss: float
    """Mean cross-entropy per target token, nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Cross-entropy in bits per byte of the text; None for masked language models."""
    tokens: int
    """Number of target tokens evaluated."""
    tokens_read: int
    """Input tokens that training has read so far."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Loss by folder of validation data."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Results of zero-shot tasks, as `task/metric`."""


class Sample(NamedTuple):
    """A text that the model continued."""

    prompt: str
    """Its beginning."""
    text: str
    """What the model wrote."""


@dataclass(frozen=True)
class SampleMetrics:
    """Texts that the model continued after some step."""

    step: int
    """Number of steps taken so far."""
    tokens_read: int
    """Input tokens that training has read so far."""
    samples: Sequence[Sample]
    """One per prompt, in their order."""


class Observer(Protocol):
    """Receives the reports of a training run."""

    def start(self, run: RunStart) -> None:
        """Handle the start of the run, before the first step."""

    def step(self, metrics: StepMetrics) -> None:
        """Handle a step; called every `logging.every` steps."""

    def validation(self, metrics: ValidationMetrics) -> None:
        """Handle a validation pass."""

    def samples(self, metrics: SampleMetrics) -> None:
        """Handle texts that the model continued."""

    def rewind(self, step: int) -> None:
        """Discard all reports after this step, because training rolls back to it."""

    def note(self, message: str) -> None:
        """Handle a message for the user, such as a saved checkpoint; one line."""

    def close(self) -> None:
        """Release all resources; called after the last step, and when training fails."""
