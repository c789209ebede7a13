"""What can be known to fail before ranks meet."""

from __future__ import annotations

from pathlib import Path

from moa_dist.checkpoint.check import newest_index
from moa_dist.checkpoint.format import Index, checkpoints
from moa_dist.config import find_layout_problems
from moa_dist.config.run import Config, run_folder
from moa_dist.data.check import check_data
from moa_dist.errors import ConfigError, DataError
from moa_dist.train.run_folder import KEPT_FILES


def check_run(config: Config, world_size: int) -> None:
    """Check what can be known to fail before ranks meet. Raises ConfigError or DataError."""
    problems = find_layout_problems(config, world_size)
    if problems:
        raise ConfigError(problems, f"{config.name} on {world_size} ranks")
    check_data(
        config.data,
        vocab_size=config.model.vocab_size,
        world_size=world_size,
        objective=config.model.objective,
    )
    _check_earlier_run(config, world_size)


def _check_earlier_run(config: Config, world_size: int) -> None:
    """Check that this run can continue from what its folder holds."""
    folder = run_folder(config)
    if not checkpoints(folder):
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            [
                f"{folder} holds checkpoints of an earlier run, and checkpoint.resume is never: "
                "choose another `name`, or delete the folder"
            ]
        )
    for file in KEPT_FILES:
        used, now = folder / file, Path(config.data.train) / file
        if used.exists() and used.read_bytes() != now.read_bytes():
            raise DataError(
                f"{folder} was trained with another {file} than that of {config.data.train}, so it "
                "cannot go on with this data: prepare it as before, or choose another `name`"
            )
    newest = newest_index(folder)
    # Without one, the checkpointer will explain; without samples there is no order to keep.
    if newest is not None and newest.samples > 0:
        problems = _order_problems(config, newest, world_size)
        if problems:
            raise ConfigError(problems, f"{folder}")


def _order_problems(config: Config, newest: Index, world_size: int) -> list[str]:
    """Explain why the run cannot continue the sample order of its newest checkpoint, if so."""
    translates = config.model.objective == "translation"
    if newest.samples % world_size and not translates:  # whose buckets ranks share from any sample
        return [
            f"the newest checkpoint has consumed {newest.samples} samples, which {world_size} "
            "ranks cannot share alike: go on with a number of ranks that divides them"
        ]
    if newest.config.model.objective != config.model.objective:
        return [
            f"model.objective was {newest.config.model.objective} before: set it back, or "
            "choose another `name`"
        ]
    before = newest.config.data
    deciding = ("seed", "bucket_tokens") if translates else ("seed", "readers")
    return [
        f"data.{f} was {getattr(before, f)} before: it decides the order of samples, and a "
        "change would repeat some and skip others; set it back, or choose another `name`"
        for f in deciding
        if getattr(before, f) != getattr(config.data, f)
    ]
