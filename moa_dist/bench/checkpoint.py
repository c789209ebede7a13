"""Section `checkpoint`: how long a save blocks training, and how long a resume takes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch.distributed as dist

from moa_dist.bench.measure import Table, Work, compare
from moa_dist.bench.setting import Setting
from moa_dist.bench.spawned_ranks import together
from moa_dist.checkpoint.agreement import broadcast_from_rank0
from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.config.run import Config
from moa_dist.distributed.mesh import Mesh
from moa_dist.models.language_model import meta_model
from moa_dist.plan.exchange_choice import decide_exchange
from moa_dist.train.build import build_engine
from moa_dist.train.engine import Engine

BLOCKED = "asynchronous save, time that training is blocked"
WAITING = "synchronous save"
RESUME = "resume, including checksums"


def checkpoint(setting: Setting, mesh: Mesh) -> list[Table]:
    """Save and resume the model and its optimizer; at most three are on disk at once."""
    config = setting.on(mesh)
    model = meta_model(config.model, recompute=config.train.recompute)
    exchange = decide_exchange(config, mesh.world_size, None, model).exchange
    engine = build_engine(config, mesh, setting.device, exchange, overlap=False, model=model)
    folder = Path(broadcast_from_rank0(partial(_new_folder, config)))
    try:
        return [_measure(setting, config, engine, folder)]
    finally:
        engine.close()
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(config: Config) -> str:
    Path(config.output).mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".bench-", dir=config.output)


def _measure(setting: Setting, config: Config, engine: Engine, folder: Path) -> Table:
    overlapping, waiting = (
        Checkpointer(engine.state, _policy(config, asynchronous=asynchronous), folder / name)
        for name, asynchronous in (("overlapping", True), ("waiting", False))
    )
    step = partial(engine.step, [setting.batch()], 1e-4)
    step()  # creates the optimizer state to save
    numbers = count(1)
    work: dict[str, Work] = {
        "step": step,
        BLOCKED: lambda: overlapping.save(next(numbers), 1),
        WAITING: lambda: waiting.save(next(numbers), 1),
        RESUME: waiting.resume,
    }
    rows = compare(
        {name: together(once) for name, once in work.items()},
        setting.device,
        repetitions=setting.repetitions,
        after={BLOCKED: overlapping.finish},
        memory=False,
    )
    num_bytes = broadcast_from_rank0(partial(_bytes_of_newest, folder / "waiting"))
    dist.barrier()  # rank 0 deletes the folder
    rows = [
        replace(row, note=f"{num_bytes / median(row.seconds) / 1e9:.2f} GB/s")
        if row.name in (WAITING, RESUME)
        else row
        for row in rows
    ]
    notes = ["ratio: to a step on one micro-batch", "a resume may read from the page cache"]
    return Table(f"checkpoint of {num_bytes / 1e6:,.1f} MB", rows, notes=notes)


def _policy(config: Config, *, asynchronous: bool) -> Config:
    policy = {
        "asynchronous": asynchronous,
        "keep_last": 1,
        "keep_every": None,
        "on_failure": "stop",
    }
    checkpoint = config.checkpoint.model_copy(update=policy)
    return config.model_copy(update={"checkpoint": checkpoint})


def _bytes_of_newest(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
