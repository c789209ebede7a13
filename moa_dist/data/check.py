"""Cheap checks of a run's data before anything expensive starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moa_dist.config.model import Objective
from moa_dist.config.run import DataConfig
from moa_dist.data.manifest import (
    AnyManifest,
    PairManifest,
    load_manifest,
    load_pair_manifest,
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
    """Check that the prepared data fits the run, as far as that needs no shard to be read.

    Training shards of a wrong size are no problem if damaged ones are to be left out.

    Args:
        data: the run's data section.
        vocab_size: of the model.
        world_size: number of ranks.
        objective: of the model.

    Returns:
        The manifests of the training and the validation data.

    Raises:
        DataError: with every problem found.
    """
    problems: list[str] = []
    uneven = None if objective == "translation" else readers_problem(data.readers, world_size)
    if uneven:
        problems.append(uneven)
    train, valid = (
        _checked_manifest(name, data, vocab_size, objective, problems) if name else None
        for name in (data.train, data.valid)
    )
    if train and valid and train.tokenizer_sha256 != valid.tokenizer_sha256:
        problems.append(
            f"{data.valid}: prepared with another tokenizer than {data.train}; prepare it again "
            f"with --tokenizer {data.train}"
        )
    if problems or train is None:
        raise DataError("\n".join(problems))
    return train, valid


def _checked_manifest(
    name: str, data: DataConfig, vocab_size: int, objective: Objective, problems: list[str]
) -> AnyManifest | None:
    folder = Path(name)
    manifest: AnyManifest
    try:
        if objective == "translation":
            manifest = load_pair_manifest(folder)
        else:
            manifest = load_manifest(folder)
    except DataError as error:
        problems.append(str(error))
        return None
    if manifest.block_length != data.sequence_length:
        problems.append(
            f"{folder}: prepared for sequences of {manifest.block_length} tokens, but "
            f"data.sequence_length is {data.sequence_length}; make them equal, or run moa-dist "
            f"prepare again with --sequence-length {data.sequence_length}"
        )
    # The last id of a masked model's vocabulary is the mask.
    reserved = 1 if objective == "masked" else 0
    if manifest.vocab_size + reserved > vocab_size:
        mask = ", the last being the mask" if reserved else ""
        problems.append(
            f"{folder}: its tokenizer has {manifest.vocab_size} tokens, but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to at least {manifest.vocab_size + reserved}"
            f"{mask}"
        )
    problems.extend(_tokenizer_problems(folder, manifest))
    if name == data.train and data.on_damage == "skip":
        return manifest
    damaged = [p for s in manifest.shards if (p := shard_file_problem(folder, s))]
    problems.extend(damaged[:_MOST_SHARDS_NAMED])
    if len(damaged) > _MOST_SHARDS_NAMED:
        problems.append(f"{folder}: {len(damaged) - _MOST_SHARDS_NAMED} more shards are damaged")
    if damaged and name == data.train and not isinstance(manifest, PairManifest):
        problems.append(SKIP_REMEDY)
    return manifest


def _tokenizer_problems(folder: Path, manifest: AnyManifest) -> Iterator[str]:
    """Whether the tokenizer beside the shards is the one that made them."""
    file = folder / TOKENIZER_FILE
    remedy = "copy it again from where the data was prepared"
    try:
        content = read_regular_file(file)
    except OSError as error:
        yield f"{file}: no tokenizer here ({error.strerror}); {remedy}"
        return
    if sha256_of(content) != manifest.tokenizer_sha256:
        yield f"{file}: not the tokenizer that these shards were made with; {remedy}"
