"""Section `data`: tokens that one reader process delivers, against those that training takes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from moa_dist.bench.measure import Table, Work, compare
from moa_dist.bench.setting import Setting
from moa_dist.bench.step import training_step
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import (
    Manifest,
    save_manifest,
    smallest_dtype,
    token_dtype,
)
from moa_dist.data.shards import write_shard
from moa_dist.data.stream import SampleStream, build_loader

_SHARDS, _SAMPLES_PER_SHARD = 8, 256
_MICRO_BATCHES = 64
"""Micro-batches per measurement, enough to amortize opening a shard."""


def data(setting: Setting) -> list[Table]:
    """Read shards of random tokens from a temporary folder, up to the micro-batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = _write(setting, folder)
        stream = SampleStream(
            [DataFolder("train", folder, manifest)],
            seed=0,
            readers=setting.config.data.readers,
            rank=0,
            world_size=1,
            consumed=0,
            micro_batch=setting.sequences,
        )
        loader = cast(Generator[Tensor, None, None], build_loader(stream, workers=1))
        with contextlib.closing(loader):
            next(loader)  # starts the process
            work: dict[str, Work] = {
                "training takes": training_step(setting, setting.config.model),
                "one worker delivers": lambda: list(islice(loader, _MICRO_BATCHES)),
            }
            rows = compare(work, setting.device, repetitions=setting.repetitions, memory=False)
    training, delivery = rows
    per_call = replace(
        delivery,
        seconds=tuple(s / _MICRO_BATCHES for s in delivery.seconds),
        ratios=tuple(r / _MICRO_BATCHES for r in delivery.ratios),
    )
    return [Table("data", [training, per_call], setting.tokens)]


def _write(setting: Setting, folder: Path) -> Manifest:
    vocab_size = setting.config.model.vocab_size
    length = setting.config.data.sequence_length
    dtype = smallest_dtype(vocab_size)
    rng = np.random.default_rng(0)
    shape = (_SAMPLES_PER_SHARD, length + 1)
    shards = tuple(
        write_shard(folder, i, rng.integers(vocab_size, size=shape).astype(token_dtype(dtype)))
        for i in range(_SHARDS)
    )
    manifest = Manifest(
        format_version=1,
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        end_of_document=0,
        block_length=length,
        dtype=dtype,
        samples_per_shard=_SAMPLES_PER_SHARD,
        shards=shards,
        documents=1,
        tokens=_SHARDS * _SAMPLES_PER_SHARD * length,
        text_bytes=1,
        dropped_tokens=0,
        seed=0,
    )
    save_manifest(manifest, folder)
    return manifest
