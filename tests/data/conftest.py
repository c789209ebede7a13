"""Small folders of shards, and text to prepare."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moa_dist.data.manifest import Manifest, save_manifest, sha256_of
from moa_dist.data.shards import write_shard

MakeShards = Callable[..., Manifest]


@pytest.fixture
def make_shards() -> MakeShards:
    """Write shards whose sample i consists of nothing but token i."""

    def make(
        folder: Path, num_shards: int = 8, samples_per_shard: int = 6, block_length: int = 3
    ) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        ids = np.arange(num_shards * samples_per_shard, dtype="<u2")
        samples = np.repeat(ids[:, None], block_length + 1, axis=1)
        manifest = Manifest(
            format_version=1,
            tokenizer_sha256=sha256_of(b"{}"),
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
        (folder / "tokenizer.json").write_bytes(b"{}")
        return manifest

    return make


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Documents of several alphabets, one of which spells the special token."""
    rng = random.Random(1)
    words = ["the", "sea", "and", "sails", "over", "wide", "café", "naïve", "日本", "🚢", "x=1;"]
    texts = [
        f"Document {n}.\n" + " ".join(rng.choices(words, k=rng.randint(5, 60))) for n in range(150)
    ]
    texts[7] += " <|endoftext|> is no end"
    return texts


@pytest.fixture(scope="session")
def text_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents, separated by blank lines."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(documents), encoding="utf-8")
    return file
