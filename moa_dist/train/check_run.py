"""What can be known to fail before ranks meet."""

from __future__ import annotations

from pathlib import Path

from moa_dist.checkpoint.check import newest_index
from moa_dist.checkpoint.format import Index, Reader, checkpoints
from moa_dist.config import find_layout_problems
from moa_dist.config.run import Config, run_folder
from moa_dist.data.cache import local_path
from moa_dist.data.check import check_data
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import ConfigError, DataError
from moa_dist.evaluate.export import is_export
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.evaluate.zero_shot import task_evaluation
from moa_dist.observe.tracker import missing_packages
from moa_dist.train.resume_changes import refusals


def check_run(config: Config, world_size: int) -> None:
    """Check what can be known to fail before ranks meet. Raises ConfigError or DataError."""
    problems = [*find_layout_problems(config, world_size)]
    problems += missing_packages(config.logging.trackers)
    if problems:
        raise ConfigError(problems, f"{config.name} on {world_size} ranks")
    check_data(
        config.data,
        vocab_size=config.model.vocab_size,
        world_size=world_size,
        objective=config.model.objective,
    )
    task_evaluation(config)
    _check_earlier_run(config, world_size)


def _check_earlier_run(config: Config, world_size: int) -> None:
    """Check that this run can continue from what its folder holds."""
    folder = run_folder(config)
    if not checkpoints(folder):
        _check_start(config, world_size)
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            [
                f"{folder} holds checkpoints of an earlier run, and checkpoint.resume is never: "
                "choose another `name`, or delete the folder"
            ]
        )
    data = local_path(config.data, config.data.sources[0])  # whose tokenizer is that of all
    used, now = folder / TOKENIZER_FILE, data / TOKENIZER_FILE
    if used.exists() and used.read_bytes() != now.read_bytes():
        raise DataError(
            f"{folder} was trained with another {TOKENIZER_FILE} than that of {data}, "
            "so its token ids mean other texts: prepare the data with the run's own, or choose "
            "another `name`"
        )
    newest = newest_index(folder)
    if newest is not None:  # else the checkpointer will explain
        _check_continuation(config, newest, folder, world_size)


def _check_start(config: Config, world_size: int) -> None:
    """Check what a new run starts from."""
    if config.init.branch is not None:
        folder = find_checkpoint(Path(config.init.branch))
        _check_continuation(config, Reader(folder).index, folder, world_size)
    elif config.init.weights is not None and not is_export(Path(config.init.weights)):
        find_checkpoint(Path(config.init.weights))


def _check_continuation(config: Config, newest: Index, folder: Path, world_size: int) -> None:
    """Check that a run of `config` can continue a checkpoint."""
    problems = refusals(config, newest)
    translates = config.model.objective == "translation"
    if newest.samples % world_size and not translates:  # whose buckets ranks share from any sample
        problems.append(
            f"the newest checkpoint has consumed {newest.samples} samples, which {world_size} "
            "ranks cannot share alike: go on with a number of ranks that divides them"
        )
    if problems:
        raise ConfigError(problems, f"{folder}")
