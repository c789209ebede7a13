"""Keeps unfinished work in a folder of its own, for the next run of the same command.

One process at a time works there. An interruption, a full disk, a kill leave the folder as it is;
an error that the same command would meet again removes it.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from moa_dist.data.prepare_settings import SETTINGS_FILE, Settings
from moa_dist.data.token_store import write_durably
from moa_dist.errors import DataError

_LOCK_FILE = "lock"
TOKENIZED_FOLDER = "tokenized"
"""Folder, in that of the work, for tokens and what they depend on."""


def hidden_folder(output: Path) -> Path:
    """Return the folder next to the output, or where the output leads to if it is a link."""
    target = output.resolve()
    return target.with_name(f".{target.name}.partial")


def parts_folder(output: Path) -> Path:
    """Return the folder next to the output in which parts are."""
    target = output.resolve()
    return target.with_name(f"{target.name}.parts")


@contextmanager
def work_folder(work: Path, output: Path, *, keep: bool = False) -> Iterator[Path]:
    """Create a folder, or continue in it, while no other process does.

    Args:
        work: the folder.
        output: what the work is for, for messages.
        keep: keep the folder even if the input or an option is wrong.

    Raises:
        DataError: the folder cannot be created or written, or another process works in it.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / _LOCK_FILE).open("ab")
    except OSError as error:
        raise DataError(
            f"{output}: cannot be created ({error}); choose another --output", path=output
        ) from error
    with lock:
        if not _is_alone(lock, work):
            raise DataError(
                f"{output}: another moa-dist prepare is writing it; wait until it ends, or choose "
                "another --output",
                path=output,
                key="--output",
            )
        try:
            yield work
        except OSError as error:
            _remove_unless_begun(work)
            raise DataError(
                f"{output}: cannot be written ({error}); free some space and run the same command "
                "again to continue, or choose another --output",
                path=output,
            ) from error
        except DataError as error:
            if not keep and not isinstance(error.__cause__, OSError):
                shutil.rmtree(work, ignore_errors=True)
            _remove_unless_begun(work)
            raise


def _remove_unless_begun(work: Path) -> None:
    """Remove a folder without tokens, in which there is nothing to continue."""
    if not (work / TOKENIZED_FOLDER).exists():
        shutil.rmtree(work, ignore_errors=True)


def _is_alone(lock: BinaryIO, work: Path) -> bool:
    """Lock the folder; return whether no other process has, or has just deleted it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return (work / _LOCK_FILE).exists()


def continued(work: Path, settings: Settings) -> tuple[Path, list[str]]:
    """Return the folder of tokens to continue in, and how work that does not fit differs.

    Such work is deleted. The names are empty if there was none.
    """
    folder = work / TOKENIZED_FOLDER
    file = folder / SETTINGS_FILE
    differences: list[str] = []
    try:
        differences = Settings.model_validate_json(file.read_bytes()).differences(settings)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
    except ValidationError:
        differences = ["the version of moa-dist or tokenizers"]
    if differences:
        shutil.rmtree(folder)
    if not folder.exists():
        folder.mkdir()
        write_durably(file, settings.model_dump_json())
    return folder, differences
