"""Checks a run's data cheaply, before anything expensive starts; finds remote data first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moa_dist.config.data import DataConfig, FolderConfig, SourceConfig
from moa_dist.config.model import Objective
from moa_dist.data.cache import mirror
from moa_dist.data.folders import DataFolder, RunData
from moa_dist.data.manifest import (
    AnyManifest,
    PairManifest,
    load_any_manifest,
    read_regular_file,
    sha256_of,
)
from moa_dist.data.shards import shard_file_problem
from moa_dist.data.stream import readers_problem
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.errors import DataError

SKIP_REMEDY = (
    "to train without the damaged shards, set data.on_damage to skip and data.verify to checksums"
)
_MOST_SHARDS_NAMED = 5


def check_data(
    data: DataConfig, *, vocab_size: int, world_size: int, objective: Objective = "causal"
) -> RunData:
    """Check that the prepared data fits the run, without reading any shard.

    Training shards of the wrong size are accepted if `data.on_damage` is `skip`.

    Args:
        data: the run's data section.
        vocab_size: the model's vocabulary size.
        world_size: number of ranks.
        objective: the model's objective.

    Returns:
        The folders to train and validate on, with their manifests.

    Raises:
        DataError: something does not fit; `causes` holds every problem found.
    """
    problems: list[DataError] = []
    uneven = None if objective == "translation" else readers_problem(data.readers, world_size)
    if uneven:
        problems.append(uneven)
    train, valid = (
        tuple(_checked_folders(folders, data, vocab_size, objective, problems))
        for folders in (data.sources, data.held_out)
    )
    problems.extend(_other_tokenizers([*train, *valid]))
    if problems:
        raise DataError("\n".join(map(str, problems)), causes=problems)
    return RunData(train, valid)


def _other_tokenizers(folders: Sequence[DataFolder]) -> Iterator[DataError]:
    """Compare the tokenizer of each folder with that of the first."""
    for name, folder, manifest in folders[1:]:
        first = folders[0]
        if manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            yield DataError(
                f"{folder}: {name} was prepared with a different tokenizer than {first.path}; "
                f"prepare it again with --tokenizer {first.path}",
                path=folder,
                key="tokenizer_sha256",
            )


def _checked_folders(
    configured: Sequence[FolderConfig],
    data: DataConfig,
    vocab_size: int,
    objective: Objective,
    problems: list[DataError],
) -> Iterator[DataFolder]:
    """Yield folders whose manifest can be read, and append what is wrong to `problems`."""
    for each in configured:
        can_skip = isinstance(each, SourceConfig)
        try:
            folder = mirror(data, each)
        except DataError as error:
            problems.append(error)
            continue
        manifest = _checked_manifest(folder, data, vocab_size, objective, problems, can_skip)
        if manifest is not None:
            yield DataFolder(each.label, folder, manifest)


def _checked_manifest(
    folder: Path,
    data: DataConfig,
    vocab_size: int,
    objective: Objective,
    problems: list[DataError],
    can_skip: bool,
) -> AnyManifest | None:
    """Load a folder's manifest and append what is wrong with the folder to `problems`."""
    try:
        manifest = load_any_manifest(folder, objective)
    except DataError as error:
        problems.append(error)
        return None
    if manifest.block_length != data.sequence_length:
        problems.append(
            DataError(
                f"{folder}: prepared for sequences of {manifest.block_length} tokens, but "
                f"data.sequence_length is {data.sequence_length}; make them equal, or run moa-dist "
                f"prepare again with --sequence-length {data.sequence_length}",
                path=folder,
                key="data.sequence_length",
            )
        )
    problems.extend(_vocabulary_problems(folder, manifest, vocab_size, objective))
    problems.extend(_tokenizer_problems(folder, manifest))
    if can_skip and data.on_damage == "skip":
        return manifest
    problems.extend(_shard_problems(folder, manifest, can_skip=can_skip))
    return manifest


def _vocabulary_problems(
    folder: Path, manifest: AnyManifest, vocab_size: int, objective: Objective
) -> Iterator[DataError]:
    """Compare the tokenizer's vocabulary with the model's, whose last id may be the mask token."""
    reserved = 1 if objective == "masked" else 0
    if manifest.vocab_size + reserved > vocab_size:
        mask = ", the last id being the mask token" if reserved else ""
        yield DataError(
            f"{folder}: its tokenizer has {manifest.vocab_size} tokens, but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to at least {manifest.vocab_size + reserved}"
            f"{mask}",
            path=folder,
            key="model.vocab_size",
        )


def _shard_problems(folder: Path, manifest: AnyManifest, *, can_skip: bool) -> Iterator[DataError]:
    """Report the first few shards that are missing or have the wrong size, and a remedy."""
    damaged = [p for s in manifest.shards if (p := shard_file_problem(folder, s))]
    yield from damaged[:_MOST_SHARDS_NAMED]
    if len(damaged) > _MOST_SHARDS_NAMED:
        more = len(damaged) - _MOST_SHARDS_NAMED
        yield DataError(f"{folder}: {more} more shards are damaged", path=folder)
    if damaged and can_skip and not isinstance(manifest, PairManifest):
        yield DataError(SKIP_REMEDY, key="data.on_damage")


def _tokenizer_problems(folder: Path, manifest: AnyManifest) -> Iterator[DataError]:
    """Check that the tokenizer next to the shards is the one that encoded them."""
    file = folder / TOKENIZER_FILE
    remedy = "copy it again from where the data was prepared"
    try:
        content = read_regular_file(file)
    except OSError as error:
        yield DataError(f"{file}: no tokenizer here ({error.strerror}); {remedy}", path=file)
        return
    if sha256_of(content) != manifest.tokenizer_sha256:
        yield DataError(
            f"{file}: not the tokenizer that these shards were made with; {remedy}",
            path=file,
            key="tokenizer_sha256",
        )
