"""Takes one step at full size before a run, and measures memory and time to compare with the plan.

Everything is built as for training and nothing is written. With a world size, one process plays
rank 0 of a larger job: it holds that rank's share of experts and of ZeRO's states and computes its
micro-batches, while the other ranks are mirror images (`moa_dist.distributed.mirror`). Memory is
that of the real job, and so is time, except for communication, which mirror images do without.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import psutil
import torch
import torch.distributed as dist

from moa_dist.config.run import Config
from moa_dist.data.batches import training_batches
from moa_dist.data.check import check_data
from moa_dist.distributed.device import enable_determinism
from moa_dist.distributed.mirror import mirrored_job
from moa_dist.distributed.start import DistContext, init_distributed
from moa_dist.errors import BadStepError, ConfigError
from moa_dist.kernels.hardware import Hardware
from moa_dist.models.language_model import meta_model
from moa_dist.models.objective import Batch
from moa_dist.plan.activations import activations_of
from moa_dist.plan.exchange_choice import layout_of
from moa_dist.plan.memory import Budget, Device, budget
from moa_dist.plan.states import sizes_of
from moa_dist.train.build import build_as_configured
from moa_dist.train.engine import Engine
from moa_dist.train.schedule import learning_rate


@dataclass(frozen=True)
class DryRun:
    """Holds the measurements of one rank."""

    world_size: int
    """Size of the job, mirror images included."""
    mirrored: bool
    """Whether the other ranks were mirror images."""
    device: Device
    """Kind of device that the step ran on."""
    sequences: int
    """Sequences of this rank in the step."""
    tokens: int
    """Targets of all ranks in the step."""
    loss: float
    """Loss of the step."""
    seconds: float
    """Duration of the second step; the first includes one-time costs."""
    peak: int
    """Peak bytes: of tensors on a GPU; on a CPU, the growth of the process."""
    reserved: int
    """Bytes reserved by the GPU's allocator; 0 on a CPU."""
    planned: Budget
    """Memory budget computed by `moa_dist.plan`."""
    exchange: dict[str, str]
    """What each expert layer sends, tokens or weights, and why."""


def dry_run(config: Config, world_size: int | None) -> DryRun:
    """Build everything of a run and take one step; `config` must fit the ranks.

    Collective over the job's ranks, each of which gets its own result. With `world_size`, it must
    be called by a single process.
    """
    before = psutil.Process().memory_info().rss
    with _job(world_size) as context:
        data = check_data(
            config.data,
            vocab_size=config.model.vocab_size,
            world_size=context.world_size,
            objective=config.model.objective,
        )
        if config.train.deterministic:
            enable_determinism()
        device: Device = "cuda" if context.device.type == "cuda" else "cpu"
        backend = "nccl" if device == "cuda" else "gloo"  # of the job that is simulated
        engine, _, decision, _ = build_as_configured(config, context.device, backend)
        mesh = engine.mesh
        layout = layout_of(config, mesh.world_size, decision.exchange)
        micro_batches = training_batches(
            config, data.train, rank=mesh.rank, world_size=mesh.world_size, consumed=0
        )
        batches = list(islice(micro_batches, layout.num_micro_batches))
        lr = learning_rate(1, config.optimizer.lr, config.schedule, config.train.steps)
        _all_but_update(engine, batches, lr)
        _wait_for(context)
        started = time.monotonic()
        result = engine.step(batches, lr)
        _wait_for(context)
        seconds = time.monotonic() - started
        on_gpu, whole = device == "cuda", meta_model(config.model)
        peak = torch.cuda.max_memory_allocated() if on_gpu else _most_resident() - before
        engine.close()
        return DryRun(
            world_size=mesh.world_size,
            mirrored=world_size is not None,
            device=device,
            sequences=len(batches) * config.train.micro_batch,
            tokens=result.tokens,
            loss=result.loss,
            seconds=seconds,
            peak=peak,
            reserved=torch.cuda.max_memory_reserved() if on_gpu else 0,
            planned=budget(
                whole,
                sizes_of(whole, mesh.expert_parallel),
                config,
                layout,
                activations_of(config, Hardware.of(context.device)),
            ),
            exchange=decision.because,
        )


def _job(world_size: int | None) -> AbstractContextManager[DistContext]:
    if world_size is None:
        return init_distributed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            [
                "--world-size lets one process play a rank of a larger job, but several were "
                "started; start one with `python`, or omit it to test the ranks that were started"
            ]
        )
    return mirrored_job(0, world_size)


def _all_but_update(engine: Engine, batches: list[Batch], lr: float) -> None:
    """Take a step without its update, because mirror images would return wrong parameters."""
    logging.disable(logging.WARNING)  # DeepSpeed warns that the step is rejected
    try:
        engine.step(batches, lr, loss_limit=-math.inf)
    except BadStepError:  # the next step would also detect a loss that is not finite
        return
    finally:
        logging.disable(logging.NOTSET)


def _wait_for(context: DistContext) -> None:
    """Wait until every rank's device has finished all its work."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    dist.barrier()


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
