"""A folder of tiny shards, as `moa-dist prepare` would leave it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moa_dist.data.manifest import Manifest, save_manifest, sha256_of
from moa_dist.data.shards import write_shard

TOKENIZER = b"{}"
"""Stands for a tokenizer where only its checksum matters."""


def write_folder(
    folder: Path, num_shards: int = 8, samples_per_shard: int = 6, block_length: int = 3
) -> Manifest:
    """Write shards whose sample i consists of nothing but token i."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(num_shards * samples_per_shard, dtype="<u2")
    samples = np.repeat(ids[:, None], block_length + 1, axis=1)
    manifest = Manifest(
        format_version=1,
        tokenizer_sha256=sha256_of(TOKENIZER),
        vocab_size=len(ids),
        end_of_document=0,
        block_length=block_length,
        dtype="uint16",
        samples_per_shard=samples_per_shard,
        shards=tuple(
            write_shard(folder, index, part)
            for index, part in enumerate(np.split(samples, num_shards))
        ),
        documents=1,
        tokens=len(ids) * block_length + 1,
        text_bytes=1,
        dropped_tokens=0,
        seed=0,
    )
    save_manifest(manifest, folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return manifest
