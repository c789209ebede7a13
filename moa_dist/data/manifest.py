"""What a folder of shards holds, samples or pairs: `manifest.json`, from `moa-dist prepare`.

The manifest is trusted for nothing that can be checked: names cannot leave the folder, and
each shard must match its checksum before it is parsed.
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

from moa_dist.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

_MOST = 2**63 - 1
Count = Annotated[PositiveInt, Field(le=_MOST)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(BaseModel):
    """One shard file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    """Name in the manifest's folder: no path separator, no `..`, no URL scheme can match."""
    sha256: Sha256
    """Checksum of the file."""
    bytes: Count
    """Size of the file."""


class ShardFolder(BaseModel):
    """What folders of samples and of pairs have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Literal[1]
    """Version of this format."""
    tokenizer_sha256: Sha256
    """Checksum of the `tokenizer.json` beside the manifest."""
    vocab_size: Count
    """Token ids run from 0 to this number, exclusive."""
    end_of_document: NonNegativeInt
    """Id of the token after each document, or text of a pair."""
    block_length: Count
    """Tokens per sequence (L)."""
    dtype: Literal["uint16", "uint32"]
    """Type of the stored tokens, little-endian."""
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]
    """The shards, in file order."""

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger]:
        """`dtype` with its byte order."""
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
    """Everything that a reader of samples must know or check.

    A sample stores L + 1 tokens, of which the last is the first of the next sample, so inputs are
    `[:-1]` and targets `[1:]`.
    """

    samples_per_shard: Count
    """The same for every shard, so that ranks can never get different numbers of samples."""
    documents: Count
    """Documents in the text."""
    tokens: Count
    """Tokens of the text, with an end-of-document token for each document."""
    text_bytes: Count
    """UTF-8 bytes of the text, for bits per byte."""
    dropped_tokens: NonNegativeInt
    """Tokens at the end that no sample holds, because they do not fill equal shards."""
    seed: NonNegativeInt
    """Seed of the order of documents."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return len(self.shards) * self.samples_per_shard

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token; bits per byte = nats per token / ln 2 / this."""
        return self.text_bytes / self.tokens

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        sample_bytes = (self.block_length + 1) * self.numpy_dtype.itemsize
        if self.samples_per_shard * sample_bytes > min(shard.bytes for shard in self.shards):
            raise ValueError("the shards are too small for their samples")
        return self


class PairManifest(ShardFolder):
    """Everything that a reader of pairs, of a source and a target text, must know or check.

    No text, with the token that ends it, is longer than L.
    """

    kind: Literal["pairs"]
    """Tells this manifest from one of samples."""
    pairs_per_shard: Count
    """In every shard but the last, which may have fewer."""
    pairs: Count
    """Pairs in all shards."""
    source_tokens: Count
    """Tokens of all source texts, ends included."""
    target_tokens: Count
    """Tokens of all target texts, ends included."""
    target_bytes: Count
    """UTF-8 bytes of the target texts, for bits per byte."""
    skipped: NonNegativeInt
    """Pairs left out, since a text was empty or too long."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of target text per token."""
        return self.target_bytes / self.target_tokens

    @model_validator(mode="after")
    def _right_number(self) -> Self:
        if -(-self.pairs // self.pairs_per_shard) != len(self.shards):
            raise ValueError("pairs, pairs_per_shard and the number of shards do not agree")
        return self


AnyManifest = Manifest | PairManifest
AnyKind = TypeVar("AnyKind", Manifest, PairManifest)


def sha256_of(data: bytes) -> str:
    """Checksum as the manifest stores it: lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_regular_file(file: Path) -> bytes:
    """Contents of a file; raises OSError, also for a pipe or device, which could block for ever."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return file.read_bytes()


def token_dtype(name: Literal["uint16", "uint32"]) -> np.dtype[np.unsignedinteger]:
    """Little-endian numpy type of stored tokens."""
    return np.dtype("<u2") if name == "uint16" else np.dtype("<u4")


def smallest_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Type that holds all ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of samples.

    Raises:
        DataError: the folder or the manifest is missing, damaged, of another version, or of pairs.
    """
    return _load(folder, Manifest)


def load_pair_manifest(folder: Path) -> PairManifest:
    """Read the manifest of a folder of pairs.

    Raises:
        DataError: the folder or the manifest is missing, damaged, of another version, or of text.
    """
    return _load(folder, PairManifest)


def _load(folder: Path, kind: type[AnyKind]) -> AnyKind:
    file = folder / MANIFEST_FILE
    try:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; make it with moa-dist prepare --output")
        content = json.loads(read_regular_file(file))
    except FileNotFoundError as error:
        parts = [part for part in ("train", "valid") if (folder / part / MANIFEST_FILE).is_file()]
        remedy = f"; use {folder / parts[0]} instead" if parts else "; run moa-dist prepare"
        raise DataError(f"{file}: missing, so this is no folder of shards{remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); copy it again or run moa-dist prepare again"
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file}: format version {version!r}, but this moa-dist reads version "
            f"{FORMAT_VERSION}; run moa-dist prepare again"
        )
    if ("kind" in content) != (kind is PairManifest):
        holds, needs = ("pairs", "--input") if "kind" in content else ("one text", "--pairs")
        raise DataError(
            f"{file}: holds {holds}, which model.objective does not learn from; prepare the data "
            f"with moa-dist prepare {needs}, or change the objective"
        )
    try:
        return kind.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()
        )
        raise DataError(
            f"{file}: invalid ({problems}); copy it again or run moa-dist prepare again"
        ) from error


def save_manifest(manifest: AnyManifest, folder: Path) -> None:
    """Write `manifest.json` into the folder."""
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
