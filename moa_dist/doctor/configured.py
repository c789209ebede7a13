"""Checks whether a configuration fits this machine: its data, checkpoints and batch sizes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

from moa_dist.config import find_layout_problems
from moa_dist.config.run import Config, run_folder
from moa_dist.doctor.finding import Finding, guarded

_GIB = 2**30


def check_configuration(config: Config, world_size: int) -> list[Finding]:
    """Check what the configuration needs from this machine and from `world_size` ranks."""
    return [
        *check_layout(config, world_size),
        *guarded("host memory", lambda: _host_memory(config, world_size)),
        *check_on_host(config),
    ]


def check_layout(config: Config, world_size: int) -> list[Finding]:
    """Check whether the configuration can run on this number of ranks."""
    return guarded("layout", lambda: _layout(config, world_size))


def check_on_host(config: Config) -> list[Finding]:
    """Check the data and the space for checkpoints, as this machine sees them."""
    return [
        *guarded("data", lambda: _data(config)),
        *guarded("checkpoints", lambda: _checkpoints(config)),
    ]


def _layout(config: Config, world_size: int) -> Iterator[Finding]:
    problems = find_layout_problems(config, world_size)
    for problem in problems:
        yield Finding("layout", "FAULT", str(problem))
    if not problems:
        train, ep = config.train, config.parallel.expert_parallel
        accumulated = train.global_batch // (world_size * train.micro_batch)
        text = (
            f"W {world_size} = ep {ep} x edp {world_size // ep}; {train.global_batch} sequences "
            f"per step = {world_size} ranks x {train.micro_batch} x {accumulated} accumulated"
        )
        yield Finding("layout", "ok", text)


def _host_memory(config: Config, world_size: int) -> Iterator[Finding]:
    """Check whether this machine's memory holds its ranks' optimizer state, if it is to."""
    if config.optimizer.offload == "none" or find_layout_problems(config, world_size):
        return
    import psutil
    import torch

    from moa_dist.models.language_model import meta_model
    from moa_dist.plan.exchange_choice import expected_states

    num_gpus = torch.cuda.device_count()
    ranks = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", num_gpus or world_size)))
    held = expected_states(config, world_size, meta_model(config.model))
    needed = ranks * held.host_total(is_pinned=num_gpus > 0)
    size = psutil.virtual_memory().total
    text = (
        f"`optimizer.offload` host: {ranks} ranks here need {needed / _GIB:.2f} GiB of host memory "
        f"for the optimizer, of {size / _GIB:.2f} GiB"
    )
    if needed > size:
        remedy = "use more nodes or machines with more memory, or set it to none"
        yield Finding("host memory", "FAULT", text, remedy)
    else:
        yield Finding("host memory", "ok", text)


def _data(config: Config) -> Iterator[Finding]:
    from moa_dist.data.check import check_data
    from moa_dist.data.manifest import PairManifest
    from moa_dist.data.pairs import read_pairs
    from moa_dist.data.places import is_unprepared
    from moa_dist.data.shards import read_shard
    from moa_dist.errors import DataError

    try:
        # world_size 1, because divisibility by the number of ranks is checked by the layout.
        model = config.model
        data = check_data(
            config.data,
            vocab_size=model.vocab_size,
            world_size=1,
            objective=model.objective,
            may_lack_text=True,
        )
        for folder in (*config.data.sources, *config.data.held_out):
            if is_unprepared(config.data, folder):
                text = f"{folder.path}: text, which the first start prepares"
                yield Finding("data", "ok", text, subject=folder.path)
        for _, path, manifest, _ in (*data.train, *data.valid):
            if isinstance(manifest, PairManifest):
                read_pairs(path, manifest)
                read = "all of them read"
            else:
                read_shard(path, manifest, 0)
                read = "the first one read"
            text = f"{path}: {len(manifest.shards)} shards present, {read}"
            yield Finding("data", "ok", text, subject=str(path))
    except DataError as error:
        for problem in str(error).splitlines():
            yield Finding("data", "FAULT", problem)


def _checkpoints(config: Config) -> Iterator[Finding]:
    from moa_dist.checkpoint.format import checkpoints

    folder = run_folder(config)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
    except OSError as error:
        text = f"cannot write below {existing}: {error.strerror}"
        remedy = "fix its permissions, or set `output` to a folder that all hosts can write to"
        yield Finding("checkpoints", "FAULT", text, remedy, subject=str(existing))
        return
    size = checkpoint_bytes(config)
    # The oldest checkpoint is deleted only after the next one is complete.
    missing = max(1, config.checkpoint.keep_last + 1 - len(checkpoints(folder)))
    free = shutil.disk_usage(existing).free
    text = (
        f"{folder} is writable; {missing} more checkpoints of {size / _GIB:.2f} GiB need "
        f"{missing * size / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free"
    )
    if free < missing * size:
        remedy = "free disk space, lower `checkpoint.keep_last`, or set `output` to another disk"
        yield Finding("checkpoints", "FAULT", text, remedy, subject=str(folder))
    else:
        yield Finding("checkpoints", "ok", text, subject=str(folder))


def checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint: the optimizer's master parameters and its moments.

    It equals what a single rank would hold, because a layout only distributes it over files.
    """
    from moa_dist.models.language_model import meta_model
    from moa_dist.plan.exchange_choice import expected_states
    from moa_dist.plan.terms import total

    alone = config.parallel.model_copy(update={"expert_parallel": 1})
    one_rank = config.model_copy(update={"parallel": alone})
    held = expected_states(one_rank, world_size=1, model=meta_model(config.model))
    return total(held.masters or held.parameters) + total(held.moments)
