"""Prints the progress of training as lines of text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from moa_dist.config.run import Config, tokens_per_sample
from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport
from moa_dist.observe.metrics import (
    RunStart,
    SampleMetrics,
    StepMetrics,
    Timing,
    ValidationMetrics,
)
from moa_dist.observe.routing import dead_experts, overall_drop_share, worst_imbalance
from moa_dist.units import duration, short

_PARTITIONED = (
    "nothing partitioned",
    "optimizer state partitioned",
    "optimizer state and gradients partitioned",
    "optimizer state, gradients and parameters partitioned",
)
"""What is partitioned, by ZeRO stage."""
_STRAGGLES = 1.3
"""Ratio of the slowest to the fastest rank's work from which the slowest is reported."""
_IMBALANCED = 4.0
"""Ratio of the fullest expert's load to the mean from which it is reported. A capacity factor of 2,
the largest in common use, then drops half of what this expert is chosen for, and without capacity
its rank waits for it; balanced routers stay at 2 to 3 once the first steps are over."""
_NEGATIVE = {"entropy": "negative entropy", "mutual_information": "negative mutual information"}
"""Balance losses that are negative by definition, by the last part of their name."""


class Console:
    """Prints a start-up block that explains each choice, then one line per report."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Print to `stream`, by default the standard output; `clock` counts seconds."""
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = 0.0
        self._first_step = 0
        self._num_steps = 1
        self._world_size = 1
        self._clip_norm: float | None = None

    def start(self, run: RunStart) -> None:
        """Print the start-up block."""
        self._started = self._clock()
        self._first_step, self._num_steps = run.first_step, run.config.train.steps
        self._world_size = run.world_size
        self._clip_norm = run.config.optimizer.clip_norm
        for name, text in _describe(run):
            self._print(f"{name:<10}{text}")

    def step(self, metrics: StepMetrics) -> None:
        """Print one line with the step's metrics, and the elapsed and the remaining time."""
        total = self._num_steps
        fields = [
            f"step {metrics.step:>{len(str(total))}}/{total}",
            f"{100 * metrics.step // total:3d}%",
            f"loss {metrics.loss:6.3f}",
        ]
        of_logits = "logits/"  # a loss, but not of routers
        balance = {n: v for n, v in metrics.aux_losses.items() if not n.startswith(of_logits)}
        if balance:
            fields.append(_balance(balance))
        fields += [
            f"lr {metrics.lr:.1e}",
            _grad_norm(metrics.grad_norm, self._clip_norm),
            f"{short(metrics.tokens_per_second):>5} tok/s",
        ]
        if self._world_size > 1:
            fields.append(f"comm {metrics.timing.communication_share:3.0%}")
        if dropped := overall_drop_share(metrics.routing):
            fields.append(f"drop {dropped:4.1%}")
        elapsed = self._clock() - self._started
        fields.append(f"elapsed {duration(elapsed):>5}")
        fields.append(f"ETA {self._eta(metrics.step, elapsed)}")
        fields += _routing_problems(metrics.routing)
        if slow := straggler(metrics.timing):
            fields.append(slow)
        self._print("  ".join(fields))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Print one line with the validation metrics."""
        width = len(str(self._num_steps))
        bits = metrics.bits_per_byte
        in_bytes = "" if bits is None else f"{bits:.3f} bits per byte  "
        self._print(
            f"valid {metrics.step:>{width - 1}}/{self._num_steps}        "
            f"loss {metrics.loss:6.3f}  perplexity {metrics.perplexity:.2f}  "
            f"{in_bytes}over {short(metrics.tokens)} tokens{_by_folder(metrics.losses)}"
            + "".join(f"  {name} {value:.3f}" for name, value in metrics.tasks.items())
        )

    def samples(self, metrics: SampleMetrics) -> None:
        """Print a line per text, in which line breaks are escaped."""
        width = len(str(self._num_steps))
        for prompt, text in metrics.samples:
            self._print(
                f"sample {metrics.step:>{width}}/{self._num_steps}        "
                f"{json.dumps(prompt, ensure_ascii=False)} {json.dumps(text, ensure_ascii=False)}"
            )

    def rewind(self, step: int) -> None:
        """Do nothing: printed lines stay, and a note reports the rollback."""

    def note(self, message: str) -> None:
        """Print the message."""
        self._print(message)

    def close(self) -> None:
        """Do nothing: every line was flushed, and the stream belongs to the caller."""

    def _eta(self, step: int, elapsed: float) -> str:
        # Based on elapsed time, not on the last tokens per second: validation and checkpoints
        # take their share of the remaining time too.
        remaining = self._num_steps - step
        return duration(elapsed / max(step - self._first_step, 1) * remaining)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def straggler(timing: Timing) -> str:
    """Describe the slowest rank if it needs much longer than the fastest, else return ""."""
    slowest, fastest = timing.slowest, timing.fastest
    if slowest.seconds < _STRAGGLES * fastest.seconds:
        return ""
    times = slowest.seconds / max(fastest.seconds, 1e-9)
    return f"straggler: rank {slowest.rank} ({slowest.host}), {times:.1f} x rank {fastest.rank}"


def _routing_problems(routing: dict[RouterCall, RoutingReport]) -> Iterator[str]:
    """Describe experts that no token chose, and the fullest expert, where they matter."""
    dead, total = dead_experts(routing)
    if dead:
        yield f"dead experts {dead} of {total}"
    ratio, router = worst_imbalance(routing)
    if ratio >= _IMBALANCED:
        yield f"fullest expert {ratio:.1f} x mean ({router})"


def _by_folder(losses: Mapping[str, float]) -> str:
    """Format the losses of several folders of validation data."""
    if len(losses) < 2:
        return ""
    return "  (" + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) + ")"


def _balance(losses: Mapping[str, float]) -> str:
    """Format the sum of the balance losses, and name the loss if it is a single, negative one."""
    kinds = {name.rpartition("/")[2] for name in losses}
    negative = _NEGATIVE.get(kinds.pop()) if len(kinds) == 1 else None
    name = f" ({negative})" if negative else ""
    return f"balance {sum(losses.values()):6.3f}{name}"


def _grad_norm(norm: float, clip_norm: float | None) -> str:
    """Format the gradient norm, and where it exceeded the limit, what it was clipped to."""
    clipped = "" if clip_norm is None else f", clipped to {clip_norm:g}"
    if clip_norm is None or norm <= clip_norm:
        clipped = " " * len(clipped)  # keeps the columns of later lines aligned
    return f"grad norm {norm:5.2f}{clipped}"


def _describe(run: RunStart) -> Iterator[tuple[str, str]]:
    config = run.config
    yield "run", f"{config.name}, in {run.folder}"
    yield "device", _device(run)
    yield "layout", _layout(config, run.world_size)
    yield "", _partition(config, run.world_size)
    for i, (part, why) in enumerate(run.exchange.items()):
        yield "" if i else "exchange", f"{part}: {why}"
    if run.overlap and run.exchange:
        yield "", "overlaps with computation, because of parallel.overlap"
    yield "batch", _batch(config, run.world_size)
    active = f"{short(run.num_active_parameters)} active per token"
    flops = f"{short(run.flops_per_token)} FLOPs per token, forward and backward"
    yield "model", f"{short(run.num_parameters)} parameters, {active}, {flops}"
    left = max(config.train.steps - run.first_step, 0) * config.train.global_batch
    tokens = (run.first_sample + left) * tokens_per_sample(config)
    if run.excluded_shards:
        yield "data", f"{run.excluded_shards} damaged shards left out, because of data.on_damage"
    at_most = " at most" if config.model.objective == "translation" else ""
    begin = f"resumed after step {run.first_step}" if run.first_step else "from the beginning"
    yield "steps", f"{config.train.steps} ({short(tokens)} tokens{at_most}), {begin}"


def _device(run: RunStart) -> str:
    why = "no CUDA device found" if run.device == "cpu" else "CUDA is available"
    precision = run.config.train.precision
    return f"{run.device}: {why}, so {run.backend}; {precision} (train.precision)"


def _layout(config: Config, world_size: int) -> str:
    ep = config.parallel.expert_parallel
    edp = world_size // ep
    layout = f"W {world_size} = ep {ep} x edp {edp}, ZeRO {config.parallel.zero_stage}"
    names = {"attention": "attention", "ffn": "FFN"}
    parts = " and ".join(names[part] for part in config.model.routed_parts())
    if not parts:
        return f"{layout}: no experts, every rank has the same parameters"
    if ep == 1:
        return f"{layout}: every rank has all {parts} experts"
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
        f"{total} {kind} per step = {ranks} x {micro} per micro-batch x "
        f"{total // (world_size * micro)} accumulated; {each}"
    )
