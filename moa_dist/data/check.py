"""Checks a run's data cheaply, before anything expensive starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moa_dist.config.model import Objective
from moa_dist.config.run import DataConfig
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
) -> tuple[AnyManifest, AnyManifest | None]:
    """Check that the prepared data fits the run, without reading any shard.

    Training shards of the wrong size are accepted if `data.on_damage` is `skip`.

    Args:
        data: the run's data section.
        vocab_size: the model's vocabulary size.
        world_size: number of ranks.
        objective: the model's objective.

    Returns:
        The manifests of the training and the validation data.

    Raises:
        DataError: something does not fit; `causes` holds every problem found.
    """
    problems: list[DataError] = []
    uneven = None if objective == "translation" else readers_problem(data.readers, world_size)
    if uneven:
        problems.append(uneven)
    train, valid = (
        _checked_manifest(name, data, vocab_size, objective, problems) if name else None
        for name in (data.train, data.valid)
    )
    if train and valid and train.tokenizer_sha256 != valid.tokenizer_sha256:
        problems.append(
            DataError(
                f"{data.valid}: prepared with a different tokenizer than {data.train}; prepare it "
                f"again with --tokenizer {data.train}",
                path=Path(str(data.valid)),
                key="tokenizer_sha256",
            )
        )
    if problems or train is None:
        raise DataError("\n".join(map(str, problems)), causes=problems)
    return train, valid


def _checked_manifest(
    name: str, data: DataConfig, vocab_size: int, objective: Objective, problems: list[DataError]
) -> AnyManifest | None:
    """Load the manifest of folder `name` and append what is wrong with the folder to `problems`."""
    folder = Path(name)
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
    if name == data.train and data.on_damage == "skip":
        return manifest
    problems.extend(_shard_problems(folder, manifest, can_skip=name == data.train))
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
