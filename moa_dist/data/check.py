"""Checks a run's data cheaply, before anything expensive starts; finds remote data first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from moa_dist.config.data import DataConfig, FolderConfig, SourceConfig
from moa_dist.config.model import Objective
from moa_dist.data.direct_text import is_text
from moa_dist.data.folders import DataFolder, RunData
from moa_dist.data.manifest import (
    AnyManifest,
    PairManifest,
    load_any_manifest,
    read_regular_file,
    sha256_of,
)
from moa_dist.data.places import (
    identity_of_configured_tokenizer,
    is_unprepared,
    local_path,
    mirror,
    vocabulary_of_text,
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
    data: DataConfig,
    *,
    vocab_size: int,
    world_size: int,
    objective: Objective = "causal",
    may_lack_text: bool = False,
) -> RunData:
    """Check that the prepared data fits the run, without reading any shard.

    Training shards of the wrong size are accepted if `data.on_damage` is `skip`.

    Args:
        data: the run's data section.
        vocab_size: the model's vocabulary size.
        world_size: number of ranks.
        objective: the model's objective.
        may_lack_text: whether text that the run would prepare first is left out of the result; it
            must exist all the same.

    Returns:
        The folders to train and validate on, with their manifests.

    Raises:
        DataError: something does not fit; `causes` holds every problem found.
    """
    problems: list[DataError] = []
    uneven = None if objective == "translation" else readers_problem(data.readers, world_size)
    if uneven:
        problems.append(uneven)
    here = partial(_ready, data, vocab_size, objective, problems, may_lack_text=may_lack_text)
    train, valid = (
        tuple(_checked_folders(folders, data, vocab_size, objective, problems))
        for folders in (list(here(data.sources)), list(here(data.held_out)))
    )
    problems.extend(_other_tokenizers([*train, *valid]))
    if may_lack_text:
        problems.extend(_other_tokenizer_for_text(data, [*train, *valid]))
    if problems:
        raise DataError("\n".join(map(str, problems)), causes=problems)
    return RunData(train, valid)


def _other_tokenizers(folders: Sequence[DataFolder]) -> Iterator[DataError]:
    """Compare the tokenizer of each folder with that of the first."""
    for name, folder, manifest, _ in folders[1:]:
        first = folders[0]
        if manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            yield DataError(
                f"{folder}: {name} was prepared with a different tokenizer than {first.path}; "
                f"prepare it again with --tokenizer {first.path}",
                path=folder,
                key="tokenizer_sha256",
            )


def _other_tokenizer_for_text(
    data: DataConfig, folders: Sequence[DataFolder]
) -> Iterator[DataError]:
    """Compare the tokenizer that text shall get with that of folders which were prepared."""
    if not any(is_text(each.path) for each in (*data.sources, *data.held_out)):
        return
    try:
        configured = identity_of_configured_tokenizer(data.prepare)
    except DataError:
        return  # reported with the text
    for folder in folders if configured is not None else ():
        if folder.manifest.tokenizer_sha256 != configured:
            yield DataError(
                f"{folder.path}: {folder.name} was prepared with a different tokenizer than "
                f"data.prepare.tokenizer, {data.prepare.tokenizer}; name {folder.path} there",
                path=folder.path,
                key="tokenizer_sha256",
            )


def _ready(
    data: DataConfig,
    vocab_size: int,
    objective: Objective,
    problems: list[DataError],
    configured: Sequence[FolderConfig],
    *,
    may_lack_text: bool,
) -> Iterator[FolderConfig]:
    """Yield the folders whose shards were made; of text, append what is wrong to `problems`."""
    for each in configured:
        try:
            if objective == "translation" and is_text(each.path):
                raise DataError(
                    f"{each.path}: text, but translation needs pairs of texts; prepare them with "
                    "moa-dist prepare --pairs",
                    path=Path(each.path),
                    key="model.objective",
                )
            if not is_unprepared(data, each):
                yield each
                continue
            if not may_lack_text:
                raise DataError(
                    f"{each.path}: text whose shards are missing in {local_path(data, each)}; "
                    "start again, which prepares them",
                    path=Path(each.path),
                )
            if size := vocabulary_of_text(data, each):
                problems.extend(_too_large(Path(each.path), size, vocab_size, objective))
        except DataError as error:
            problems.append(error)


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
            yield DataFolder(each.label, folder, manifest, each.task)


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
    problems.extend(_too_large(folder, manifest.vocab_size, vocab_size, objective))
    problems.extend(_tokenizer_problems(folder, manifest))
    if can_skip and data.on_damage == "skip":
        return manifest
    problems.extend(_shard_problems(folder, manifest, can_skip=can_skip))
    return manifest


def _too_large(
    folder: Path, size: int, vocab_size: int, objective: Objective
) -> Iterator[DataError]:
    """Compare a tokenizer's vocabulary with the model's, whose last id may be the mask token."""
    reserved = 1 if objective == "masked" else 0
    if size + reserved > vocab_size:
        mask = ", the last id being the mask token" if reserved else ""
        yield DataError(
            f"{folder}: its tokenizer has {size} tokens, but model.vocab_size is {vocab_size}; set "
            f"model.vocab_size to at least {size + reserved}{mask}",
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
