"""Finds and loads trained models: checkpoints and exports, with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moa_dist.checkpoint import format as checkpoint_format
from moa_dist.checkpoint.check import require_valid
from moa_dist.checkpoint.format import INDEX_FILE, Reader, checkpoints, tokenizer_of
from moa_dist.config.load import config_of, load_config
from moa_dist.config.model import ModelConfig, Objective
from moa_dist.config.run import Config
from moa_dist.data.manifest import sha256_of
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.distributed.device import default_device
from moa_dist.errors import DataError
from moa_dist.evaluate.export import CONFIG_FILE, is_export, load_export
from moa_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class Trained:
    """Holds a whole trained model on one process."""

    folder: Path
    """Folder of the checkpoint or export."""
    model: LanguageModel
    """The model, in fp32 and evaluation mode."""
    device: torch.device
    """Device of the model: the first GPU if one is available."""
    step: int
    """Number of optimizer steps that it was trained for."""
    config: Config
    """Configuration of the run."""
    tokenizer: Tokenizer
    """Tokenizer of the run."""
    tokenizer_file: Path
    """Path of the tokenizer."""
    tokenizer_sha256: str
    """Checksum of `tokenizer_file`."""


def load_trained(path: Path) -> Trained:
    """Load an export, a checkpoint, or the newest checkpoint of a run, given its folder.

    Raises:
        DataError: the checkpoint or the tokenizer is missing or damaged, or they do not fit.
        ClusterError: torch cannot use the GPUs of this machine.
    """
    device = default_device()  # before a large checkpoint is read in vain
    folder = path if is_export(path) else find_checkpoint(path)
    file = folder / TOKENIZER_FILE if is_export(folder) else tokenizer_of(folder)
    tokenizer = load_tokenizer(file)
    model, config, step = _load(folder)
    require_fit(tokenizer, config.model, file)
    return Trained(
        folder=folder,
        model=model.to(device),
        device=device,
        step=step,
        config=config,
        tokenizer=tokenizer,
        tokenizer_file=file,
        tokenizer_sha256=sha256_of(file.read_bytes()),
    )


def config_of_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration of what `load_trained` would load, and apply overrides.

    Raises DataError, and ConfigError.
    """
    if is_export(path):
        return load_config(path / CONFIG_FILE, overrides)
    config = Reader(find_checkpoint(path)).index.config
    return config_of(config.model_dump(mode="json"), overrides, str(path))


def require_fit(tokenizer: Tokenizer, model: ModelConfig, file: Path) -> None:
    """Raise DataError if the tokenizer, read from `file`, has tokens that the model does not."""
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{file}: has {tokenizer.vocab_size} tokens, but the model knows {model.vocab_size} "
            "(model.vocab_size); use the tokenizer that the model was trained with",
            path=file,
            key="model.vocab_size",
        )


def require(trained: Trained, objective: Objective, what: str) -> None:
    """Raise DataError unless the model was trained with `objective`, which `what` needs.

    Neither may its tokens depend on later ones against that objective.
    """
    found = trained.config.model.objective
    if found != objective:
        raise DataError(
            f"{trained.folder}: trained with model.objective {found}, but {what} needs a model "
            f"trained with {objective}",
            path=trained.folder,
            key="model.objective",
        )
    if reason := trained.config.model.looks_ahead:
        raise DataError(
            f"{trained.folder}: {what} needs tokens that depend on earlier ones only, but {reason}",
            path=trained.folder,
            key="model.recursion.kind",
        )


def require_task(trained: Trained, task: int | None) -> None:
    """Raise DataError if the model has no such task, of those that it has a router for each."""
    num_tasks = trained.config.model.num_tasks
    if task is not None and task >= num_tasks:
        has = f"routers for {num_tasks} tasks, from 0" if num_tasks else "no router per task"
        raise DataError(
            f"{trained.folder}: the model has {has}, but the task is {task}",
            path=trained.folder,
            key="task",
        )


def load_model(path: str | Path) -> LanguageModel:
    """Load the model of an export, a checkpoint, or the newest checkpoint of a run.

    It is whole, on the CPU, in fp32 and evaluation mode; no process group is needed. Raises
    DataError if it is missing or damaged.
    """
    path = Path(path)
    return _load(path if is_export(path) else find_checkpoint(path))[0]


def _load(folder: Path) -> tuple[LanguageModel, Config, int]:
    if is_export(folder):
        return load_export(folder)
    require_valid(folder)
    model, index = checkpoint_format.read_model(folder)
    return model, index.config, index.step


def find_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of the run at `path`, or `path` if it is a checkpoint.

    Raises DataError if there is none.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the folder of a run", path=path) from error
    saved = checkpoints(path)
    if saved:
        return saved[-1]
    absolute = path.resolve()
    if absolute in checkpoints(absolute.parent) or (absolute / INDEX_FILE).exists():
        return absolute
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise DataError(f"{path}: {what}; give the folder of a run or a checkpoint", path=path)
    runs = sorted(run for run in path.iterdir() if checkpoints(run))
    remedy = (
        f"give one of its runs, such as {runs[0]}"
        if runs
        else "give the folder of a run that has saved one; a run saves after every "
        "`checkpoint.every` steps and after its last"
    )
    raise DataError(
        f"{path}: holds no checkpoint (step-...); {remedy}", path=path, key="checkpoint.every"
    )
