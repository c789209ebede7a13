"""Describes a folder of shards, of samples or pairs: `manifest.json` of `moa-dist prepare`.

Whatever the manifest claims is checked where it can be: file names cannot leave the folder, and
a shard must match its checksum before it is parsed.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from moa_dist.config.model import Objective
from moa_dist.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "valid")
"""Names of the folders of shards in an output with a validation share."""

_MOST = 2**63 - 1
Count = Annotated[PositiveInt, Field(le=_MOST)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(BaseModel):
    """Identifies one shard file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    """File name in the manifest's folder; no path separator, `..` or URL scheme can match."""
    sha256: Sha256
    """Checksum of the file."""
    bytes: Count
    """Size of the file."""


class ShardFolder(BaseModel):
    """Holds the fields that folders of samples and of pairs share."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Literal[1]
    """Version of this format."""
    tokenizer_sha256: Sha256
    """Checksum of the `tokenizer.json` next to the manifest."""
    vocab_size: Count
    """Size of the vocabulary; token ids are below it."""
    end_of_document: NonNegativeInt
    """Id of the token that ends each document, or each text of a pair."""
    block_length: Count
    """Tokens per sequence (L)."""
    dtype: Literal["uint16", "uint32"]
    """Type of the stored little-endian tokens."""
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]
    """The shards, in file order."""

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger]:
        """Return `dtype` as a numpy type with its byte order."""
        return token_dtype(self.dtype)

    @model_validator(mode="after")
    def _vocabulary_and_names(self) -> Self:
        if self.end_of_document >= self.vocab_size:
            raise ValueError("end_of_document is not below vocab_size")
        if self.vocab_size - 1 > np.iinfo(self.numpy_dtype).max:
            raise ValueError(f"vocab_size does not fit {self.dtype}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same file name")
        return self


class Manifest(ShardFolder):
    """Holds everything that a reader of samples must know or check.

    A sample stores L + 1 tokens, of which the last is the first of the next sample, so inputs are
    `[:-1]` and targets `[1:]`.
    """

    samples_per_shard: Count
    """Samples in each shard; all are equal, so that all ranks get as many samples."""
    documents: Count
    """Number of documents in the text."""
    tokens: Count
    """Number of tokens in the text, one end-of-document token per document included."""
    text_bytes: Count
    """UTF-8 bytes of the text, needed to compute bits per byte."""
    dropped_tokens: NonNegativeInt
    """Tokens at the end that are in no sample, because they do not fill shards of equal size."""
    seed: NonNegativeInt
    """Seed that shuffled the documents."""

    @property
    def num_samples(self) -> int:
        """Return the number of samples in all shards."""
        return len(self.shards) * self.samples_per_shard

    @property
    def bytes_per_token(self) -> float:
        """Return UTF-8 bytes per token; bits per byte = nats per token / ln 2 / this."""
        return self.text_bytes / self.tokens

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        sample_bytes = (self.block_length + 1) * self.numpy_dtype.itemsize
        if self.samples_per_shard * sample_bytes > min(shard.bytes for shard in self.shards):
            raise ValueError("the shards are too small for their samples")
        return self


class PairManifest(ShardFolder):
    """Holds everything that a reader of pairs of a source and a target text must know or check.

    No text is longer than L tokens, its end token included.
    """

    kind: Literal["pairs"]
    """Distinguishes this manifest from one of samples."""
    pairs_per_shard: Count
    """Pairs in every shard but the last, which may have fewer."""
    pairs: Count
    """Number of pairs in all shards."""
    source_tokens: Count
    """Number of tokens in all source texts, end tokens included."""
    target_tokens: Count
    """Number of tokens in all target texts, end tokens included."""
    target_bytes: Count
    """UTF-8 bytes of the target texts, needed to compute bits per byte."""
    skipped: NonNegativeInt
    """Pairs left out because a text was empty or too long."""

    @property
    def bytes_per_token(self) -> float:
        """Return UTF-8 bytes of target text per target token."""
        return self.target_bytes / self.target_tokens

    @model_validator(mode="after")
    def _right_number(self) -> Self:
        if -(-self.pairs // self.pairs_per_shard) != len(self.shards):
            raise ValueError("pairs, pairs_per_shard and the number of shards do not agree")
        return self


AnyManifest = Manifest | PairManifest
AnyKind = TypeVar("AnyKind", Manifest, PairManifest)


def load_any_manifest(folder: Path, objective: Objective) -> AnyManifest:
    """Load the manifest of a folder prepared for this objective. Raises DataError."""
    return load_pair_manifest(folder) if objective == "translation" else load_manifest(folder)


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 checksum in lower-case hexadecimal, as the manifest stores it."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 checksum of a file, which is read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_regular_file(file: Path) -> bytes:
    """Read a file. Raises OSError, also for a pipe or a device, which could block forever."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return file.read_bytes()


def token_dtype(name: Literal["uint16", "uint32"]) -> np.dtype[np.unsignedinteger]:
    """Return the little-endian numpy type of stored tokens."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def smallest_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds all ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of samples.

    Raises:
        DataError: the folder or manifest is missing or damaged, has another version, or holds
            pairs.
    """
    return _load(folder, Manifest)


def load_pair_manifest(folder: Path) -> PairManifest:
    """Read the manifest of a folder of pairs.

    Raises:
        DataError: the folder or manifest is missing or damaged, has another version, or holds
            samples.
    """
    return _load(folder, PairManifest)


def _load(folder: Path, kind: type[AnyKind]) -> AnyKind:
    file = folder / MANIFEST_FILE
    try:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; create it with moa-dist prepare --output", path=folder
            )
        content = json.loads(read_regular_file(file))
    except FileNotFoundError as error:
        splits = [split for split in SPLITS if (folder / split / MANIFEST_FILE).is_file()]
        remedy = f"; use {folder / splits[0]} instead" if splits else "; run moa-dist prepare"
        raise DataError(
            f"{file}: missing, so this is not a folder of shards{remedy}", path=file
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); copy it again or run moa-dist prepare again",
            path=file,
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file}: format version {version!r}, but this moa-dist reads version "
            f"{FORMAT_VERSION}; run moa-dist prepare again",
            path=file,
            key="format_version",
        )
    if ("kind" in content) != (kind is PairManifest):
        holds, needs = ("pairs", "--input") if "kind" in content else ("one text", "--pairs")
        raise DataError(
            f"{file}: holds {holds}, which model.objective cannot train on; prepare the data "
            f"with moa-dist prepare {needs}, or change the objective",
            path=file,
            key="kind",
        )
    try:
        return kind.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        fields = [".".join(map(str, e["loc"])) or "manifest" for e in error.errors()]
        problems = "; ".join(
            f"{field}: {e['msg']}" for field, e in zip(fields, error.errors(), strict=True)
        )
        raise DataError(
            f"{file}: invalid ({problems}); copy it again or run moa-dist prepare again",
            path=file,
            key=fields[0],
        ) from error


def save_manifest(manifest: AnyManifest, folder: Path) -> None:
    """Write `manifest.json` into `folder`."""
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
