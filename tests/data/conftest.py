"""Small folders of shards, and text to prepare."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_dist.data.manifest import Manifest
from tests.small_shards import write_folder

MakeShards = Callable[..., Manifest]


@pytest.fixture
def make_shards() -> MakeShards:
    """Write shards whose sample i consists of nothing but token i."""
    return write_folder


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
