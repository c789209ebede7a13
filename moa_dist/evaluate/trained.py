"""Finding what a run has trained: a checkpoint, and the tokenizer beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moa_dist.config.run import Config
from moa_dist.data.manifest import sha256_of
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.errors import DataError
from moa_dist.models.language_model import LanguageModel
from moa_dist.train.checkpoint_files import checkpoints, load_model


@dataclass(frozen=True)
class Trained:
    """A whole trained model on one process."""

    folder: Path
    """The checkpoint's folder."""
    model: LanguageModel
    """In fp32 and evaluation mode."""
    device: torch.device
    """Where the model is: the first GPU if there is one."""
    step: int
    """Optimizer steps that it was trained for."""
    config: Config
    """Configuration of its run."""
    tokenizer: Tokenizer
    """Tokenizer of its run."""
    tokenizer_sha256: str
    """Checksum of the run's `tokenizer.json`."""


def load_trained(path: Path) -> Trained:
    """Load a checkpoint, given by its folder or by that of its run, then the newest.

    Raises:
        DataError: there is no checkpoint or no tokenizer, or they are damaged.
    """
    folder = find_checkpoint(path)
    file = folder.parent / TOKENIZER_FILE
    tokenizer = load_tokenizer(file)
    model, index = load_model(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trained(
        folder=folder,
        model=model.to(device),
        device=device,
        step=index.step,
        config=index.config,
        tokenizer=tokenizer,
        tokenizer_sha256=sha256_of(file.read_bytes()),
    )


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of the run at `path`, or `path` itself if it is a checkpoint."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the folder of a run") from error
    saved = checkpoints(path)
    if saved:
        return saved[-1]
    absolute = path.resolve()
    if absolute in checkpoints(absolute.parent):
        return absolute
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give the folder of a run or of a checkpoint")
    runs = sorted(run for run in path.iterdir() if checkpoints(run))
    remedy = (
        f"give one of its runs, such as {runs[0]}"
        if runs
        else "give the folder of a run that has saved one; a run saves after every "
        "`checkpoint.every` steps and after its last"
    )
    raise DataError(f"{path}: holds no checkpoint (step-...); {remedy}")
