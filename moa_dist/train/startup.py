"""Starts a run: from a configuration to the state in which the next step can be taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from moa_dist.checkpoint.agreement import broadcast_from_rank0
from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.checkpoint.lease import hold_run_folder
from moa_dist.checkpoint.note import Note
from moa_dist.config.objective_checks import objective_notes
from moa_dist.config.run import Config, run_folder
from moa_dist.data.corruption import CheckedData, check_all_data
from moa_dist.data.history import OrderHistory
from moa_dist.data.notes import data_notes
from moa_dist.distributed.device import enable_determinism
from moa_dist.distributed.preemption import Preemption
from moa_dist.distributed.start import DistContext, init_distributed
from moa_dist.distributed.watchdog import Watchdog
from moa_dist.errors import TrainingError
from moa_dist.evaluate.samples import samples_of
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.evaluate.zero_shot import task_evaluation
from moa_dist.kernels.triton_support import triton_problem
from moa_dist.observe.metrics import Observer, RouterSize, RunStart
from moa_dist.train.bad_steps import BadSteps
from moa_dist.train.build import Built, build_as_configured
from moa_dist.train.profile import Tracer
from moa_dist.train.reporter import Reporter
from moa_dist.train.resume_changes import History, describe, find_changes, replaced
from moa_dist.train.run import Progress, Run
from moa_dist.train.run_folder import describe_run
from moa_dist.train.start_from import load_weights
from moa_dist.train.step_sync import names_of_hosts


@contextmanager
def open_run(config: Config, observer: Observer, preemption: Preemption) -> Iterator[Run]:
    """Join the job, build everything and load the newest checkpoint; close it all at the end.

    Collective. If all ranks raise a TrainingError in the block, a checkpoint that is being written
    is still completed.
    """
    with ExitStack() as stack:
        context = stack.enter_context(init_distributed())
        stack.enter_context(hold_run_folder(run_folder(config)))
        data = check_all_data(config, context.world_size)
        if config.train.deterministic:
            enable_determinism()
        built = build_as_configured(config, context.device, context.backend)
        stack.callback(built.engine.close)
        run, notes = _resume(config, context, data, built, observer, preemption)
        for part in (run.tracer, run.watchdog, run.reporter):
            stack.callback(part.close)  # the last one first
        if not run.done:  # else the folder stays as the run left it
            broadcast_from_rank0(partial(describe_run, config, run.folder))
        run.reporter.start(_run_start(run, context, built))
        run.reporter.notes(notes)
        run.begin()
        try:
            yield run
        except TrainingError:
            run.reporter.notes(run.checkpointer.finish())
            raise


def _resume(
    config: Config,
    context: DistContext,
    data: CheckedData,
    built: Built,
    observer: Observer,
    preemption: Preemption,
) -> tuple[Run, list[Note | str]]:
    """Load the newest checkpoint; returns the run that continues it, and notes to report."""
    folder, mesh = run_folder(config), built.engine.mesh
    checkpointer = Checkpointer(built.engine.state, config, folder)
    resumed = checkpointer.resume()
    begun: list[str] = []
    if resumed.config is None and config.init.branch is not None:
        resumed = checkpointer.branch(find_checkpoint(Path(config.init.branch)))
    elif resumed.config is None and config.init.weights is not None:
        begun = load_weights(built.engine.state, config)
    before = resumed.config or config
    changed = find_changes(before, resumed.state, config)
    damaged = {name: tuple(shards) for name, shards in data.damaged.items()}
    # Excluded shards are numbers of the data that were read before.
    earlier = OrderHistory.read(resumed.state).without_exclusions(replaced(resumed.state, config))
    order = earlier.continued(config.data, resumed.samples, damaged)
    run = Run(
        config=config,
        folder=folder,
        engine=built.engine,
        data=data,
        tasks=task_evaluation(config),
        samples=samples_of(config),
        order=order,
        progress=Progress.of(resumed, before),
        history=History.after(resumed.state, changed, resumed.step, config),
        bad_steps=BadSteps(config.train, resumed.state.get("bad_steps")),
        checkpointer=checkpointer,
        reporter=Reporter(observer, mesh.rank),
        tracer=Tracer(config.profile, folder, mesh.rank, context.device),
        watchdog=Watchdog(
            context.heartbeat,
            mesh.comm_timer,
            folder,
            limit_s=config.train.step_limit,
            world_size=mesh.world_size,
        ),
        preemption=preemption,
        hosts=names_of_hosts(),
    )
    notes = [*describe(changed, before, config, resumed.step), *objective_notes(config)]
    notes += [*data_notes(config), *kernel_notes(context.device)]
    return run, [*resumed.notes, *begun, *notes, *data.notes(order, resumed.samples)]


def kernel_notes(device: torch.device) -> Iterator[str]:
    """Note that experts run without Triton, if this device would need it."""
    if device.type == "cuda" and (problem := triton_problem()) is not None:
        yield (
            f"{problem}: experts for which torch's grouped product does not fit run one product "
            "per expert, which is slow; see `moa-dist doctor`"
        )


def _run_start(run: Run, context: DistContext, built: Built) -> RunStart:
    config = run.config
    device = str(context.device.type)
    if context.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(context.device)})"
    return RunStart(
        config=config,
        folder=str(run.folder),
        world_size=context.world_size,
        device=device,
        backend=context.backend,
        num_parameters=built.counts.total,
        num_active_parameters=built.counts.training.active,
        flops_per_token=built.counts.flops_per_token,
        first_step=run.progress.step,
        first_sample=run.progress.samples,
        changes=run.history.changes,
        provenance=run.checkpointer.provenance,
        excluded_shards=sum(map(len, run.data.damaged.values())),
        exchange=built.decision.because,
        overlap=built.overlap,
        hosts=run.hosts,
        routers={
            name: RouterSize(
                router.num_groups,
                router.config.num_experts,
                router.config.experts_per_token(training=True).mean,
            )
            for (_, name), router in run.engine.model.routers().items()
        },
        mean_names={key: router.mean_names for key, router in run.engine.model.routers().items()},
    )
