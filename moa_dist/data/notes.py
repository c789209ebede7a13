"""What may look wrong about a run's data, and may be on purpose; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moa_dist.config.data import FolderConfig, is_remote
from moa_dist.config.run import Config
from moa_dist.data.direct_text import is_text
from moa_dist.data.manifest import load_any_manifest
from moa_dist.data.places import describe_tokenizer, is_unprepared, local_path
from moa_dist.errors import DataError


def data_notes(config: Config) -> Iterator[str]:
    """Name what may well be on purpose: folders that are not here, and token ids that never occur.

    Folders that cannot be read otherwise are left to `check_data`.
    """
    for field, folders in (("train", config.data.sources), ("valid", config.data.held_out)):
        for folder in folders:
            if is_text(folder.path):
                yield from _text_notes(config, field, folder)
            elif not is_remote(folder.path) and not Path(folder.path).is_dir():
                yield f"data.{field}: there is no folder {folder.path} here"
    first = config.data.sources[0]
    if is_text(first.path) and is_remote(first.path):
        return  # its place is known to those who may ask its server
    try:
        manifest = load_any_manifest(local_path(config.data, first), config.model.objective)
    except DataError:
        return
    reserved = 1 if config.model.objective == "masked" else 0
    unused = config.model.vocab_size - manifest.vocab_size - reserved
    if unused > 0:
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {first.path} has "
            f"{manifest.vocab_size} tokens: {unused} ids never occur"
        )


def _text_notes(config: Config, field: str, folder: FolderConfig) -> Iterator[str]:
    """Say what the first start will do with text, unless it was done or the text is missing."""
    data = config.data
    try:
        if is_remote(folder.path) or is_unprepared(data, folder):
            yield (
                f"data.{field}: {folder.path} is text; the first start prepares it, with "
                f"{describe_tokenizer(data, folder)}"
            )
    except DataError:
        return  # left to `check_data`
