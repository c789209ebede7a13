"""What may look wrong about a run's data, and may be on purpose; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moa_dist.config.data import is_remote
from moa_dist.config.run import Config
from moa_dist.data.cache import local_path
from moa_dist.data.manifest import load_any_manifest
from moa_dist.errors import DataError


def data_notes(config: Config) -> Iterator[str]:
    """Name what may well be on purpose: folders that are not here, and token ids that never occur.

    Folders that cannot be read otherwise are left to `check_data`.
    """
    for field, folders in (("train", config.data.sources), ("valid", config.data.held_out)):
        for folder in folders:
            if not is_remote(folder.path) and not Path(folder.path).is_dir():
                yield f"data.{field}: there is no folder {folder.path} here"
    first = config.data.sources[0]
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
