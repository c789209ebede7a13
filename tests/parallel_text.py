"""Files of parallel lines: a small language, and its words spelled backwards."""

import random
from pathlib import Path

from moa_dist.data.manifest import PairManifest
from moa_dist.data.prepare_pairs import PairFiles, prepare_pairs

WORDS = ["sea", "wind", "the", "café", "over", "sails", "日本", "far", "and", "🚢"]
LENGTH = 40


def lines(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    sources = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count))
    return [(source, source[::-1]) for source in sources]


def write_lines(folder: Path, pairs: list[tuple[str, str]]) -> PairFiles:
    folder.mkdir(parents=True, exist_ok=True)
    files = PairFiles(folder / "text.source", folder / "text.target")
    for file, texts in zip(files, zip(*pairs, strict=True), strict=True):
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return files


def write_pairs(
    folder: Path, count: int = 60, *, tokenizer: Path | None = None, pairs_per_shard: int = 16
) -> PairManifest:
    """Prepare `count` pairs into `folder`."""
    files = write_lines(folder.with_name(f"{folder.name}-text"), lines(count))
    return prepare_pairs(
        [files],
        folder,
        block_length=LENGTH,
        vocab_size=300,
        tokenizer=tokenizer,
        pairs_per_shard=pairs_per_shard,
    )
