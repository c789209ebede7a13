"""The training loop, to be read from top to bottom.

    configuration -> mesh -> sharded model -> engine -> stream -> step, step, step

All state of a run is its parameters, its optimizer moments, and how many steps and samples it
has consumed: data order, learning rate and random numbers are functions of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moa_dist.config import to_yaml
from moa_dist.config.run import Config, run_folder
from moa_dist.data.batches import held_out_batches, training_batches
from moa_dist.data.check import check_data
from moa_dist.data.manifest import AnyManifest
from moa_dist.data.order import Exclusions, as_json, exclude, read_exclusions
from moa_dist.distributed.device import enable_determinism, min_device_memory, should_overlap
from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.distributed.preemption import Preemption
from moa_dist.distributed.start import DistContext, init_distributed
from moa_dist.distributed.watchdog import Watchdog
from moa_dist.errors import BadStepError, ExitCode, TrainingError
from moa_dist.evaluate.perplexity import bits_per_byte, perplexity
from moa_dist.models.counts import count
from moa_dist.models.objective import Batch
from moa_dist.observe.metrics import Observer, RunStart, StepMetrics, Timing, ValidationMetrics
from moa_dist.plan.exchange_choice import decide_exchange
from moa_dist.provenance import provenance
from moa_dist.train.bad_steps import BadSteps
from moa_dist.train.build import build_engine
from moa_dist.train.check_run import KEPT_FILES
from moa_dist.train.checkpoint import Checkpointer, Resumed, broadcast_from_rank0
from moa_dist.train.corruption import find_corrupt_shards, summary
from moa_dist.train.engine import Engine
from moa_dist.train.optimizer import learning_rate
from moa_dist.train.out_of_memory import explained
from moa_dist.train.profile import Tracer
from moa_dist.train.step_sync import gather_interval, names_of_hosts, sync_step
from moa_dist.train.step_timer import StepTimer


def train(config: Config, observer: Observer, preemption: Preemption) -> ExitCode:
    """Train as configured, from the newest checkpoint if there is one.

    Every rank of the job calls this; `observer` listens on rank 0. Returns PREEMPTED, after
    saving, if `preemption` was requested of any rank, else DONE.
    """
    with init_distributed() as context:
        train_manifest, valid_manifest = check_data(
            config.data,
            vocab_size=config.model.vocab_size,
            world_size=context.world_size,
            objective=config.model.objective,
        )
        damaged = find_corrupt_shards(config.data, train_manifest, valid_manifest)
        if config.train.deterministic:
            enable_determinism()
        mesh = make_mesh(config.parallel.expert_parallel)
        decision = decide_exchange(config, mesh.world_size, min_device_memory(context.device))
        overlap = should_overlap(config.parallel.overlap, context.backend)
        engine = build_engine(config, mesh, context.device, decision.exchange, overlap=overlap)
        folder = run_folder(config)
        checkpointer = Checkpointer(engine, config, folder)
        resumed = checkpointer.resume()
        step, samples = resumed.step, resumed.samples
        exclusions = exclude(
            read_exclusions(resumed.state.get("exclusions")), samples, tuple(damaged)
        )
        policy = BadSteps(config.train, resumed.state.get("bad_steps"))

        def save() -> list[str]:
            state = {"exclusions": as_json(exclusions), "bad_steps": policy.state()}
            return checkpointer.save(step, samples, state)

        listener = observer if mesh.rank == 0 else None
        tracer = Tracer(config.profile, folder, mesh.rank, context.device)
        watchdog = Watchdog(
            context.heartbeat,
            mesh.comm_timer,
            folder,
            limit_s=config.train.step_limit,
            world_size=mesh.world_size,
        )
        try:
            broadcast_from_rank0(partial(describe_run, config, folder))
            if listener:
                run_start = _run_start(config, context, folder, step)
                listener.start(
                    replace(
                        run_start,
                        excluded_shards=len(damaged),
                        exchange=decision.because,
                        overlap=overlap,
                    )
                )
            _tell(listener, resumed.notes)
            _tell(listener, _notes_on_damage(damaged, exclusions, train_manifest, samples))
            micro_batches = _micro_batches(config, train_manifest, mesh, samples, exclusions)
            accumulation = config.train.global_batch // (mesh.world_size * config.train.micro_batch)
            hosts = names_of_hosts()
            step_timer, tokens_read = StepTimer(step, mesh.comm_timer), 0
            while step < config.train.steps:
                watchdog.begin(step + 1)
                batches = [next(micro_batches) for _ in range(accumulation)]
                sync = sync_step(preemption.requested, batches, context.device, mesh.comm_timer)
                if sync.stop:
                    break
                samples += config.train.global_batch
                _seed_random_numbers(config.train.seed, step + 1, mesh.rank)
                lr = learning_rate(
                    step + 1, config.optimizer.lr, config.schedule, config.train.steps
                )
                try:
                    with tracer.step(step + 1), explained(engine, config, folder, step + 1):
                        result = engine.step(batches, lr, policy.loss_limit)
                except BadStepError as error:
                    watchdog.rest()
                    policy.reject(error, step + 1)
                    bad, first = step + 1, samples - config.train.global_batch
                    if config.train.on_bad_step == "rewind":
                        resumed = _rollback(checkpointer, policy, listener, step)
                        step, first = resumed.step, resumed.samples
                        micro_batches = _micro_batches(
                            config, train_manifest, mesh, samples, exclusions
                        )
                        step_timer, tokens_read = StepTimer(step, mesh.comm_timer), 0
                    _tell(listener, [policy.discard(first, samples, bad, error)])
                    continue
                watchdog.rest()
                step += 1
                tokens_read += result.tokens_read
                policy.accept(step, result.loss)
                with step_timer.paused():
                    _tell(listener, tracer.write())

                if _due(step, config.logging.every, config):
                    lap = step_timer.lap(step)
                    interval = gather_interval(
                        result.routing, result.traffic, lap, mesh, context.device
                    )
                    _tell(listener, checkpointer.poll())
                    if listener:
                        listener.step(
                            StepMetrics(
                                step=step,
                                loss=result.loss,
                                aux_losses=result.aux_losses,
                                grad_norm=result.grad_norm,
                                lr=lr,
                                samples=samples,
                                digest=sync.digest,
                                tokens=result.tokens,
                                tokens_per_second=tokens_read / lap.seconds,
                                timing=Timing.of(interval.work, interval.wait, hosts),
                                routing=interval.routing,
                                traffic=interval.traffic,
                            )
                        )
                    tokens_read = 0
                if valid_manifest and _due(step, config.evaluation.every, config):
                    with step_timer.paused():
                        metrics = _validate(engine, config, valid_manifest, step)
                    if listener:
                        listener.validation(metrics)
                if _due(step, config.checkpoint.every, config):
                    with step_timer.paused():
                        notes = save()
                    _tell(listener, notes)
            watchdog.rest()
            preempted = step < config.train.steps
            if preempted and step > 0:
                _tell(listener, save())
            _tell(listener, checkpointer.finish())
            if preempted:
                again = "the same command goes on from there"
                _tell(listener, [f"preempted after step {step}: {again}"])
            return ExitCode.PREEMPTED if preempted else ExitCode.DONE
        except TrainingError:  # raised by all ranks: a checkpoint on its way is still wanted
            _tell(listener, checkpointer.finish())
            raise
        finally:
            if listener:
                listener.close()
            watchdog.close()
            tracer.close()
            engine.close()


def _due(step: int, every: int, config: Config) -> bool:
    return step % every == 0 or step == config.train.steps


def _rollback(
    checkpointer: Checkpointer, policy: BadSteps, listener: Observer | None, step: int
) -> Resumed:
    """Restore the newest checkpoint, and the reports and the memory that belong to it."""
    resumed = checkpointer.resume(last_step=step)
    policy.rollback(resumed.state.get("bad_steps"))
    if listener:
        listener.rewind(resumed.step)
    _tell(listener, resumed.notes)
    return resumed


def _tell(listener: Observer | None, notes: Iterable[str]) -> None:
    if listener:
        for note in notes:
            listener.note(note)


def describe_run(config: Config, folder: Path) -> None:
    """Keep beside the checkpoints what they depend on. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {file: (Path(config.data.train) / file).read_bytes() for file in KEPT_FILES}
    for file, content in ({"config.yaml": to_yaml(config).encode()} | contents).items():
        path, new = folder / file, folder / f".{file}.new"
        if not path.exists() or path.read_bytes() != content:
            new.write_bytes(content)
            new.replace(path)  # cut short, it would be another run's


def _run_start(config: Config, context: DistContext, folder: Path, step: int) -> RunStart:
    counts = count(config.model, config.data.sequence_length)
    device = str(context.device.type)
    if context.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(context.device)})"
    return RunStart(
        config=config,
        folder=str(folder),
        world_size=context.world_size,
        device=device,
        backend=context.backend,
        num_parameters=counts.total,
        num_active_parameters=counts.active,
        flops_per_token=counts.flops_per_token,
        first_step=step,
        provenance=provenance(),
    )


def _notes_on_damage(
    damaged: dict[int, str], exclusions: Exclusions, manifest: AnyManifest, samples: int
) -> Iterator[str]:
    for problem in summary(damaged):
        yield f"left out: {problem}"
    if exclusions and exclusions[-1].since == samples:
        yield (
            f"the order of samples changes at sample {samples}: {len(damaged)} of "
            f"{len(manifest.shards)} shards are left out from there on"
        )


def _micro_batches(
    config: Config, manifest: AnyManifest, mesh: Mesh, samples: int, exclusions: Exclusions
) -> Iterator[Batch]:
    return training_batches(
        config,
        manifest,
        rank=mesh.rank,
        world_size=mesh.world_size,
        consumed=samples,
        exclusions=exclusions,
    )


def _seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """Expert dropout of a step does not depend on how training came to it."""
    digest = hashlib.blake2b(repr((seed, step, rank)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def _validate(
    engine: Engine, config: Config, manifest: AnyManifest, step: int
) -> ValidationMetrics:
    assert config.data.valid is not None
    batches = held_out_batches(
        config,
        Path(config.data.valid),
        manifest,
        rank=engine.mesh.rank,
        world_size=engine.mesh.world_size,
        micro_batch=config.train.micro_batch,
        sequences=config.evaluation.sequences,
    )
    result = perplexity(engine.deepspeed, batches, engine.device)
    return ValidationMetrics(
        step=step,
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=bits_per_byte(result, config.model, manifest),
        tokens=result.tokens,
    )
