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
from moa_dist.errors import ConfigError, DataError, Problem
from moa_dist.evaluate.export import is_export
from moa_dist.evaluate.samples import samples_of
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.evaluate.zero_shot import task_evaluation
from moa_dist.observe.tracker import missing_packages
from moa_dist.train.resume_changes import refusals


def check_run(config: Config, world_size: int) -> None:
    """Check what can be known to fail before ranks meet.

    Raises:
        ConfigError: The settings do not fit the ranks, or the run that continues; names all else
            that is wrong too.
        DataError: Only the data or files are at fault.
    """
    folder = run_folder(config)
    resumes = bool(checkpoints(folder))
    newest = newest_index(folder) if resumes else _start(config)
    problems: list[Problem | str] = []
    if resumes and config.checkpoint.resume == "never":
        newest = None
        problems.append(
            f"{folder} holds checkpoints of an earlier run, and checkpoint.resume is never: choose "
            "another `name`, or delete the folder"
        )
    problems += find_layout_problems(config, world_size, newest.samples if newest else None)
    problems += missing_packages(config.logging.trackers)
    try:
        check_data(
            config.data,
            vocab_size=config.model.vocab_size,
            world_size=1,  # the number of ranks was checked
            objective=config.model.objective,
        )
        task_evaluation(config)
        samples_of(config)
        if resumes:
            _check_tokenizer(config, folder)
        if newest is not None:  # else the checkpointer will explain
            problems += refusals(config, newest)
    except DataError as error:
        if not problems:
            raise
        problems += map(str, error.causes or [error])
    if problems:
        raise ConfigError(problems, f"{config.name} on {world_size} ranks")


def _start(config: Config) -> Index | None:
    """Return the checkpoint that a new run continues as a branch; check what it starts from."""
    if config.init.branch is not None:
        return Reader(find_checkpoint(Path(config.init.branch))).index
    if config.init.weights is not None and not is_export(Path(config.init.weights)):
        find_checkpoint(Path(config.init.weights))
    return None


def _check_tokenizer(config: Config, folder: Path) -> None:
    """Check that the run in this folder was trained with the tokenizer of the data."""
    data = local_path(config.data, config.data.sources[0])  # whose tokenizer is that of all
    used, now = folder / TOKENIZER_FILE, data / TOKENIZER_FILE
    if used.exists() and used.read_bytes() != now.read_bytes():
        raise DataError(
            f"{folder} was trained with another {TOKENIZER_FILE} than that of {data}, "
            "so its token ids mean other texts: prepare the data with the run's own, or choose "
            "another `name`"
        )
