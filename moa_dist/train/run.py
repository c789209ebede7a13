"""A run under way: everything it holds, and what the training loop does with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue

from moa_dist.checkpoint.checkpointer import Checkpointer, Resumed
from moa_dist.checkpoint.note import Note
from moa_dist.config.run import Config, tokens_per_sample
from moa_dist.data.batches import held_out_batches, training_batches
from moa_dist.data.corruption import CheckedData
from moa_dist.data.epochs import sources_read
from moa_dist.data.history import OrderHistory
from moa_dist.data.mixture import Mixture
from moa_dist.distributed.mesh import Mesh
from moa_dist.distributed.preemption import Preemption
from moa_dist.distributed.watchdog import Watchdog
from moa_dist.errors import BadStepError, DataError, ExitCode, TrainingError
from moa_dist.evaluate.perplexity import Perplexity, bits_per_byte, combined, perplexity
from moa_dist.evaluate.samples import Samples
from moa_dist.evaluate.zero_shot import TaskEvaluation
from moa_dist.models.objective import Batch
from moa_dist.observe.metrics import Sample, SampleMetrics, StepMetrics, Timing, ValidationMetrics
from moa_dist.train.bad_steps import BadSteps
from moa_dist.train.engine import Engine, StepResult
from moa_dist.train.out_of_memory import explain_out_of_memory
from moa_dist.train.part_norms import part_norms
from moa_dist.train.profile import Tracer
from moa_dist.train.reporter import Reporter
from moa_dist.train.resume_changes import History
from moa_dist.train.schedule import learning_rate
from moa_dist.train.step_sync import StepSync, gather_interval, sync_step
from moa_dist.train.step_timer import StepTimer


@dataclass
class Progress:
    """How far a run has come."""

    step: int
    """Steps taken."""
    samples: int
    """Sequences consumed, those of rejected steps included."""
    tokens: int
    """Input tokens without padding that the steps taken have read."""

    @staticmethod
    def of(resumed: Resumed, config: Config) -> Progress:
        """Return the progress of a checkpoint; tokens are an upper bound if it lacks them."""
        at_most = resumed.samples * tokens_per_sample(resumed.config or config)
        tokens = cast(int, resumed.state.get("tokens_read", at_most))
        return Progress(resumed.step, resumed.samples, tokens)


@dataclass
class Run:
    """What one rank holds while it trains. Made by `open_run`, which also closes it.

    Methods are collective unless they say otherwise; the loop calls them in one order on all ranks.
    """

    config: Config
    folder: Path
    """The run's folder."""
    engine: Engine
    data: CheckedData
    tasks: TaskEvaluation | None
    """Zero-shot tasks to score with every validation."""
    samples: Samples | None
    """Prompts to continue."""
    order: OrderHistory
    """Weights of the sources and shards that are left out, and since which sample."""
    progress: Progress
    history: History
    """What resuming has changed so far."""
    bad_steps: BadSteps
    checkpointer: Checkpointer
    reporter: Reporter
    tracer: Tracer
    watchdog: Watchdog
    preemption: Preemption
    hosts: list[str]
    """Name of the machine of every rank, in rank order."""
    _stream: Iterator[Batch] = field(init=False)
    _timer: StepTimer = field(init=False)
    _reported_tokens: int = field(init=False)
    _first_step: int = field(init=False)

    def begin(self) -> None:
        """Open the stream of samples and start the clock; called once, before the first step."""
        self._stream = self._open_stream()
        self._first_step = self.progress.step
        self._restart_timer()

    @property
    def _mesh(self) -> Mesh:
        return self.engine.mesh

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(self.order.stages, self.config.data.readers)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken. Local."""
        return self.progress.step >= self.config.train.steps

    def next_batches(self) -> list[Batch]:
        """Read this rank's micro-batches of one step. Local; raises DataError."""
        train = self.config.train
        self.watchdog.arm(self.progress.step + 1)
        accumulation = train.global_batch // (self._mesh.world_size * train.micro_batch)
        return [next(self._stream) for _ in range(accumulation)]

    def sync(self, batches: list[Batch]) -> StepSync:
        """Agree on whether to stop, and on a digest of what all ranks have read."""
        requested, comm_timer = self.preemption.requested, self._mesh.comm_timer
        return sync_step(requested, batches, self.engine.device, comm_timer)

    def step(self, batches: list[Batch]) -> StepResult | None:
        """Take one optimizer step; returns None if it was rejected.

        Raises TrainingError if the policy is not to go on after a step that is rejected.
        """
        step = self.progress.step + 1
        self.progress.samples += self.config.train.global_batch
        _seed_random_numbers(self.config.train.seed, step, self._mesh.rank)
        try:
            with (
                self.tracer.step(step),
                explain_out_of_memory(self.engine, self.config, self.folder, step),
            ):
                result = self.engine.step(
                    batches,
                    self._learning_rate(step),
                    self.bad_steps.loss_limit,
                    measure_parts=self._measures_parts(step),
                )
        except BadStepError as error:
            self.watchdog.disarm()
            self._reject(error)
            return None
        self.watchdog.disarm()
        self.progress.step = step
        self.progress.tokens += result.tokens_read
        self.bad_steps.accept(step, result.loss)
        with self._timer.paused():
            self.reporter.notes(self.tracer.write())
        return result

    def log(self, result: StepResult, digest: str) -> None:
        """Report the last step, `result`, every `logging.every` steps.

        `digest` identifies the tokens of its global batch.
        """
        if not self._is_due(self.config.logging.every):
            return
        step = self.progress.step
        lap = self._timer.lap(step)
        interval = gather_interval(
            result.routing,
            result.traffic,
            lap,
            self._mesh,
            self.engine.device,
            result.part_squares,
        )
        self.reporter.notes(self.checkpointer.poll())
        self.reporter.step(
            StepMetrics(
                step=step,
                loss=result.loss,
                aux_losses=result.aux_losses,
                grad_norm=result.grad_norm,
                lr=self._learning_rate(step),
                samples=self.progress.samples,
                sources=sources_read(self.data.train, self._mixture, self.progress.samples),
                digest=digest,
                tokens=result.tokens,
                tokens_read=self.progress.tokens,
                tokens_per_second=(self.progress.tokens - self._reported_tokens) / lap.seconds,
                timing=Timing.of(interval.work, interval.wait, self.hosts),
                routing=interval.routing,
                traffic=interval.traffic,
                parts=part_norms(interval.part_squares, result.grad_norm),
                token_means=result.token_means,
            )
        )
        self._reported_tokens = self.progress.tokens

    def validate(self) -> None:
        """Report the loss on held-out data, if any, every `evaluation.every` steps."""
        if not self.data.valid or not self._is_due(self.config.evaluation.every):
            return
        with self._timer.paused():
            metrics = self._validation_metrics()
        self.reporter.validation(metrics)

    def sample(self) -> None:
        """Report continuations of the prompts, if any, every `evaluation.samples.every` steps."""
        settings = self.config.evaluation.samples
        if self.samples is None or not self._is_due(settings.every):
            return
        with self._timer.paused():
            texts = self.samples.run(self.engine.deepspeed)
        samples = [Sample(*pair) for pair in zip(settings.prompts, texts, strict=True)]
        self.reporter.samples(SampleMetrics(self.progress.step, self.progress.tokens, samples))

    def save(self) -> None:
        """Begin to write a checkpoint every `checkpoint.every` steps. Raises SaveError."""
        if self._is_due(self.config.checkpoint.every):
            with self._timer.paused():
                notes = self._save()
            self.reporter.notes(notes)

    def finish(self) -> ExitCode:
        """Save a run that was asked to stop, and wait for the last checkpoint.

        Raises SaveError.
        """
        self.watchdog.disarm()
        if not self.done and self.progress.step > 0:
            self.reporter.notes(self._save())
        self.reporter.notes(self.checkpointer.finish())
        if self.done:
            if self.progress.step == self._first_step:
                self.reporter.notes([self._nothing_left()])
            return ExitCode.DONE
        again = "the same command goes on from there"
        self.reporter.notes([f"preempted after step {self.progress.step}: {again}"])
        return ExitCode.PREEMPTED

    def _nothing_left(self) -> str:
        step, steps = self.progress.step, self.config.train.steps
        fewer = " is fewer than that" if steps < step else ""
        return (
            f"nothing left to do: {step} steps have been taken, and train.steps = {steps}{fewer}; "
            "raise it to train on"
        )

    def _validation_metrics(self) -> ValidationMetrics:
        results: list[Perplexity] = []
        for _, path, manifest, task in self.data.valid:
            batches = held_out_batches(
                self.config,
                path,
                manifest,
                rank=self._mesh.rank,
                world_size=self._mesh.world_size,
                micro_batch=self.config.train.micro_batch,
                sequences=self.config.evaluation.sequences,
                task=task,
            )
            results.append(perplexity(self.engine.deepspeed, batches, self.engine.device))
        together = combined(results)
        names, _, manifests, _ = zip(*self.data.valid, strict=True)
        return ValidationMetrics(
            step=self.progress.step,
            loss=together.loss,
            perplexity=together.perplexity,
            bits_per_byte=bits_per_byte(results, self.config.model, manifests),
            tokens=together.tokens,
            tokens_read=self.progress.tokens,
            losses={name: result.loss for name, result in zip(names, results, strict=True)},
            tasks=self.tasks.run(self.engine.deepspeed) if self.tasks is not None else {},
        )

    def _save(self) -> list[Note]:
        state: dict[str, JsonValue] = {
            "bad_steps": self.bad_steps.state(),
            "tokens_read": self.progress.tokens,
            **self.order.state(),
            **self.history.state(),
        }
        return self.checkpointer.save(self.progress.step, self.progress.samples, state)

    def _reject(self, error: BadStepError) -> None:
        """Leave out the samples of a bad step and, if so configured, restore a checkpoint."""
        bad, stop = self.progress.step + 1, self.progress.samples
        self.bad_steps.reject(error, bad)
        first = stop - self.config.train.global_batch
        if self.config.train.on_bad_step == "rewind":
            try:
                first = self._rollback()
            except DataError as cannot:
                raise TrainingError(
                    f"step {bad} was rejected: {error}; and rewinding failed: {cannot}"
                ) from error
        self.reporter.notes([self.bad_steps.discard(first, stop, bad, error)])

    def _rollback(self) -> int:
        """Restore the newest checkpoint, all but its samples; returns how many it had consumed."""
        resumed = self.checkpointer.resume(last_step=self.progress.step)
        self.bad_steps.rollback(resumed.state.get("bad_steps"))
        self.reporter.rewind(resumed.step)
        self.reporter.notes(resumed.notes)
        restored = Progress.of(resumed, self.config)
        self.progress.step, self.progress.tokens = restored.step, restored.tokens
        self._stream = self._open_stream()
        self._restart_timer()
        return resumed.samples

    def _open_stream(self) -> Iterator[Batch]:
        """Read on from the first sample that is not consumed."""
        return training_batches(
            self.config,
            self.data.train,
            rank=self._mesh.rank,
            world_size=self._mesh.world_size,
            consumed=self.progress.samples,
            history=self.order,
        )

    def _restart_timer(self) -> None:
        self._timer = StepTimer(self.progress.step, self._mesh.comm_timer)
        self._reported_tokens = self.progress.tokens

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, config.optimizer.lr, config.schedule, config.train.steps)

    def _measures_parts(self, step: int) -> bool:
        logging = self.config.logging
        return (
            logging.parts_every is not None
            and step % logging.every == 0
            and step % logging.parts_every == 0
        )

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.done


def _seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """Make expert dropout of a step independent of how training came to it."""
    digest = hashlib.blake2b(repr((seed, step, rank)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
