"""What can be known to fail before ranks meet."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from moa_dist.checkpoint.check import newest_index
from moa_dist.checkpoint.format import Index, Reader, checkpoints
from moa_dist.config import find_layout_problems
from moa_dist.config.run import Config, run_folder
from moa_dist.data.check import check_data
from moa_dist.data.direct_text import ShouldStop, never
from moa_dist.data.places import is_unprepared, local_path, prepare_texts
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import ConfigError, DataError, Problem
from moa_dist.evaluate.export import is_export
from moa_dist.evaluate.samples import samples_of
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.evaluate.zero_shot import task_evaluation
from moa_dist.observe.tracker import missing_packages
from moa_dist.train.resume_changes import refusals


def check_run(config: Config, world_size: int, should_stop: ShouldStop = never) -> None:
    """Check what can be known to fail before ranks meet; prepare text that the data names first.

    Raises:
        ConfigError: The settings do not fit the ranks, or the run that continues; names all else
            that is wrong too.
        DataError: Only the data or files are at fault.
        StoppedError: `should_stop` returned True while text was prepared.
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
        lacks_text = _check_data(config, should_stop, may_prepare=not problems)
        if not lacks_text:
            task_evaluation(config)
            samples_of(config)
        if resumes and not lacks_text:
            _check_tokenizer(config, folder)
        if newest is not None and not lacks_text:  # else the checkpointer will explain
            problems += refusals(config, newest)
    except DataError as error:
        if not problems:
            raise
        problems += map(str, error.causes or [error])
    if problems:
        raise ConfigError(problems, f"{config.name} on {world_size} ranks")


def _check_data(config: Config, should_stop: ShouldStop, *, may_prepare: bool) -> bool:
    """Check the data, and prepare text if all else fits; returns whether text is still to be."""
    check = partial(
        check_data,
        config.data,
        vocab_size=config.model.vocab_size,
        world_size=1,  # the number of ranks was checked
        objective=config.model.objective,
    )
    check(may_lack_text=True)
    folders = (*config.data.sources, *config.data.held_out)
    if not any(is_unprepared(config.data, folder) for folder in folders):
        return False
    if may_prepare:
        prepare_texts(config.data, folders, should_stop)
        check()
    return not may_prepare


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
