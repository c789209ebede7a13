"""Training as lines of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from moa_dist.config.run import Config, tokens_per_sample
from moa_dist.observe.metrics import RunStart, StepMetrics, Timing, ValidationMetrics
from moa_dist.observe.routing import overall_drop_share
from moa_dist.observe.units import duration, short

_PARTITIONED = (
    "nothing partitioned",
    "optimizer state partitioned",
    "optimizer state and gradients partitioned",
    "optimizer state, gradients and parameters partitioned",
)
"""By ZeRO stage."""
_STRAGGLES = 1.3
"""Of the fastest rank's work, what is worth a word."""


class Console:
    """Prints what was chosen because of what, then a line per report."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stream` defaults to the standard output; `clock` counts seconds."""
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = 0.0
        self._first_step = 0
        self._num_steps = 1
        self._world_size = 1

    def start(self, run: RunStart) -> None:
        """Print the start-up block."""
        self._started = self._clock()
        self._first_step, self._num_steps = run.first_step, run.config.train.steps
        self._world_size = run.world_size
        for name, text in _describe(run):
            self._print(f"{name:<10}{text}")

    def step(self, metrics: StepMetrics) -> None:
        """Print one line with what is done and how long the rest takes."""
        total = self._num_steps
        fields = [
            f"step {metrics.step:>{len(str(total))}}/{total}",
            f"{100 * metrics.step // total:3d}%",
            f"loss {metrics.loss:6.3f}",
        ]
        if metrics.aux_losses:
            fields.append(f"aux {sum(metrics.aux_losses.values()):6.3f}")
        fields += [
            f"lr {metrics.lr:.1e}",
            f"norm {metrics.grad_norm:5.2f}",
            f"{short(metrics.tokens_per_second):>5} tok/s",
        ]
        if self._world_size > 1:
            fields.append(f"comm {metrics.timing.communication_share:3.0%}")
        if metrics.routing:
            fields.append(f"drop {overall_drop_share(metrics.routing):4.1%}")
        fields.append(f"ETA {self._eta(metrics.step)}")
        if slow := straggler(metrics.timing):
            fields.append(slow)
        self._print("  ".join(fields))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Print one line."""
        width = len(str(self._num_steps))
        bits = metrics.bits_per_byte
        in_bytes = "" if bits is None else f"{bits:.3f} bits per byte  "
        self._print(
            f"valid {metrics.step:>{width - 1}}/{self._num_steps}        "
            f"loss {metrics.loss:6.3f}  perplexity {metrics.perplexity:.2f}  "
            f"{in_bytes}over {short(metrics.tokens)} tokens"
        )

    def rewind(self, step: int) -> None:
        """Nothing: lines that were printed stay, and a note says so."""

    def note(self, message: str) -> None:
        """Print the message."""
        self._print(message)

    def close(self) -> None:
        """Nothing: every line was flushed, and the stream is not ours."""

    def _eta(self, step: int) -> str:
        # By the clock, not by the last tokens per second: validation and checkpoints take
        # their share of the remaining time too.
        elapsed = self._clock() - self._started
        remaining = self._num_steps - step
        return duration(elapsed / max(step - self._first_step, 1) * remaining)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def straggler(timing: Timing) -> str:
    """Which rank holds up the others, if one needs much longer than the fastest."""
    slowest, fastest = timing.slowest, timing.fastest
    if slowest.seconds < _STRAGGLES * fastest.seconds:
        return ""
    times = slowest.seconds / max(fastest.seconds, 1e-9)
    return f"rank {slowest.rank} ({slowest.host}) works {times:.1f} x rank {fastest.rank}'s time"


def _describe(run: RunStart) -> Iterator[tuple[str, str]]:
    config = run.config
    yield "run", f"{config.name}, in {run.folder}"
    yield "device", _device(run)
    yield "layout", _layout(config, run.world_size)
    yield "", _partition(config, run.world_size)
    for i, (part, why) in enumerate(run.exchange.items()):
        yield "" if i else "exchange", f"{part}: {why}"
    if run.overlap and run.exchange:
        yield "", "travels beside computation, by parallel.overlap"
    yield "batch", _batch(config, run.world_size)
    active = f"{short(run.num_active_parameters)} active per token"
    flops = f"{short(run.flops_per_token)} FLOPs per token, forward and backward"
    yield "model", f"{short(run.num_parameters)} parameters, {active}, {flops}"
    tokens = config.train.steps * config.train.global_batch * tokens_per_sample(config)
    if run.excluded_shards:
        yield "data", f"{run.excluded_shards} damaged shards left out, by data.on_damage"
    at_most = " at most" if config.model.objective == "translation" else ""
    begin = f"resumed after step {run.first_step}" if run.first_step else "from the beginning"
    yield "steps", f"{config.train.steps} ({short(tokens)} tokens{at_most}), {begin}"


def _device(run: RunStart) -> str:
    why = "no CUDA device found" if run.device == "cpu" else "CUDA is available"
    return f"{run.device}: {why}, so {run.backend}; {run.config.train.precision} by train.precision"


def _layout(config: Config, world_size: int) -> str:
    ep = config.parallel.expert_parallel
    edp = world_size // ep
    layout = f"W {world_size} = ep {ep} x edp {edp}, ZeRO {config.parallel.zero_stage}"
    names = {"attention": "attention", "ffn": "FFN"}
    parts = " and ".join(names[part] for part in config.model.routed_parts())
    if not parts:
        return f"{layout}: no experts, the same parameters on every rank"
    if ep == 1:
        return f"{layout}: {parts} experts whole on every rank"
    copies = f", {edp} copies of each shard" if edp > 1 else ""
    return f"{layout}: {parts} experts sharded over {ep} ranks{copies}"


def _partition(config: Config, world_size: int) -> str:
    stage, ep = config.parallel.zero_stage, config.parallel.expert_parallel
    if stage == 0 or world_size == 1:
        return _PARTITIONED[0]
    over = f"over {world_size} ranks"
    if ep > 1:
        over = f"dense over {world_size} ranks, experts over {world_size // ep}"
    return f"{_PARTITIONED[stage]}: {over}"


def _batch(config: Config, world_size: int) -> str:
    total, micro = config.train.global_batch, config.train.micro_batch
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    kind, each = "sequences", f"{config.data.sequence_length} tokens each"
    if config.model.objective == "translation":
        kind, each = "buckets of pairs", f"at most {config.data.bucket_tokens} tokens each"
    return (
        f"{total} {kind} a step = {ranks} x {micro} per micro-batch x "
        f"{total // (world_size * micro)} accumulated; {each}"
    )
