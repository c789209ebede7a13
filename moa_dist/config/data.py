"""The data section: what to train and validate on, and in which order."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from moa_dist.config.prepare import PrepareConfig
from moa_dist.config.section import MAY_CHANGE, FolderPath, Section

REMOTE_EXTRAS = {"s3": "s3", "gs": "gs", "hf": "hf", "https": "http", "http": "http"}
"""Scheme of a URL -> extra of the package that reads it."""
_SPLITS = ("train", "valid")
"""Folders in an output of `moa-dist prepare`; they do not tell one text from another."""


def is_remote(path: str) -> bool:
    """Whether a folder is given by a URL."""
    return "://" in path


def url_problem(url: str) -> str | None:
    """Return what is wrong with a URL, without repeating what may be a secret."""
    scheme, _, rest = url.partition("://")
    if scheme not in REMOTE_EXTRAS:
        schemes = (f"{known}://" for known in REMOTE_EXTRAS)
        return f"is a URL of {scheme}://, which cannot be read; use one of {', '.join(schemes)}"
    if (scheme != "hf" and "@" in rest) or any(mark in rest for mark in ("?", "#", "::")):
        return (
            f"is a URL of {scheme}:// with a user, a query, a fragment or `::`; give the folder "
            "alone, and credentials in the environment"
        )
    if not all(part not in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        return f"is a URL of {scheme}:// without a host or bucket, or with an empty part"
    return None


class CacheConfig(Section):
    """Where each node keeps shards that are read from URLs."""

    folder: FolderPath | None = None
    """Folder on a local disk, which all ranks of a node share; null for `moa-dist` in
    `$XDG_CACHE_HOME`, or in `~/.cache`."""
    max_gb: PositiveFloat = 100.0
    """GB (10^9 bytes) that the folder may hold; shards that were not used for longest make room.
    Reading is fastest if two shards per reader and source fit."""


class FolderConfig(Section):
    """One of several folders of prepared shards."""

    path: FolderPath
    """The folder, or the URL of one."""
    name: str | None = None
    """Name in metrics and checkpoints: letters, digits, `.`, `_` and `-`. By default the folder's
    own name, or its parent's if that is `train` or `valid`: `books` for `data/books/train`, and for
    a range of files."""
    task: NonNegativeInt | None = None
    """Number of the task that its sequences belong to, for routers with one per task
    (`router.tasks`); sources may share a task."""

    @property
    def label(self) -> str:
        """Return the name, given or derived from the path."""
        if self.name is not None:
            return self.name
        parts = [part for part in self.path.split("/") if part not in ("", ".", "..")]
        if len(parts) > 1 and (parts[-1] in _SPLITS or "{" in parts[-1]):
            parts.pop()
        return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "data")


class SourceConfig(FolderConfig):
    """One of several sources of training data."""

    weight: NonNegativeFloat
    """Share of the samples that come from this source, relative to the other weights. Each source
    has epochs of its own."""
    later_weights: tuple[tuple[PositiveInt, NonNegativeFloat], ...] = ()
    """Other weights from later samples of the run on, in ascending order: `[[50000, 0.2]]` makes
    the weight 0.2 once 50,000 samples of all sources together have been consumed. A change takes
    effect at the next multiple of `data.readers`."""

    def weight_at(self, sample: int) -> float:
        """Return the weight that applies at this global sample."""
        begun = [weight for since, weight in self.later_weights if since <= sample]
        return begun[-1] if begun else self.weight


class DataConfig(Section):
    """Prepared shards to train and validate on (see `moa-dist prepare`)."""

    train: Annotated[FolderPath | tuple[SourceConfig, ...], MAY_CHANGE]
    """Folder with the training shards and their manifest, or several sources with weights. A
    folder may be a URL: `s3://`, `gs://`, `hf://`, `https://` or `http://`. A resumed run may find
    them elsewhere. Text that was never prepared, in any form that `moa-dist prepare` reads, is
    prepared when the run starts (see `data.prepare`)."""
    valid: Annotated[FolderPath | tuple[FolderConfig, ...] | None, MAY_CHANGE] = None
    """Folder with the validation shards, or several, on each of which the loss is also reported by
    itself; null for no validation."""
    cache: Annotated[CacheConfig, MAY_CHANGE] = CacheConfig()
    """Where shards from URLs are kept."""
    prepare: Annotated[PrepareConfig, MAY_CHANGE] = PrepareConfig()
    """How text becomes shards. Changes make other data, which a resumed run notices."""
    sequence_length: PositiveInt
    """Tokens per sequence; must equal the block length that the shards were prepared with."""
    document_attention: bool = False
    """Whether a token sees only its own document, with positions that start anew in each. Documents
    are packed end to end, and as in the papers a token sees those before its own otherwise. The end
    token belongs to the document that it ends. Not for translation, nor with `train.compile`."""
    bucket_tokens: PositiveInt = 4096
    """For translation, where a sample is a bucket of pairs of similar length: the maximum size of
    a bucket, which is its pairs times its longest text, padding included. Raise this rather than
    `train.micro_batch`: the buckets of one micro-batch are padded to the longest text of all."""
    readers: PositiveInt = 8
    """Shards that all ranks together read in parallel; must be a multiple of the number of ranks.
    The order of samples depends on it, and on nothing else in the layout. Ignored for translation,
    where every rank holds all pairs in memory."""
    workers: Annotated[NonNegativeInt, MAY_CHANGE] = 1
    """Background processes per rank that prefetch; 0 reads in the training process. Ignored for
    translation."""
    seed: NonNegativeInt = 0
    """Seed of the sample order."""
    verify: Annotated[Literal["sizes", "checksums"], MAY_CHANGE] = "sizes"
    """What is checked before the first step: the size of every shard, or its checksum, which reads
    all data once, divided among the ranks. In both cases a shard's checksum is verified whenever
    the shard is opened, and damage found then stops the run. Sizes are checked in local folders
    only."""
    on_damage: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What to do when damaged training shards are found before the first step: `stop` lists them
    and ends, `skip` lists them and excludes them on every rank. `skip` needs `verify: checksums`:
    damage found later stops the run, and its next start excludes the shard. Validation shards are
    never excluded, since results would no longer be comparable."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Return what to train on; a single folder is a source named `train`."""
        if isinstance(self.train, str):
            return (SourceConfig(path=self.train, name="train", weight=1.0),)
        return self.train

    @property
    def held_out(self) -> tuple[FolderConfig, ...]:
        """Return what to validate on; a single folder is named `valid`."""
        if isinstance(self.valid, str):
            return (FolderConfig(path=self.valid, name="valid"),)
        return self.valid or ()
