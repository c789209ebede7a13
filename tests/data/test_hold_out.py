"""A validation share works on any text, is decided before the work, and never leaks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moa_dist.data.manifest import load_manifest
from moa_dist.data.prepare import Prepared, prepare
from moa_dist.data.text_options import TextOptions
from tests.data.test_prepare import decoded_documents
from tests.raises import raises_data_error

WORDS = ["river", "stone", "cloud", "bright", "seven", "walks", "under", "letter", "winter"]


def text(seed: int, words: int) -> str:
    chosen = random.Random(seed).choices(WORDS, k=words)
    return " ".join(chosen).replace(" winter ", "\n")


def run(inputs: list[Path], output: Path, *, share: float = 0.01, length: int = 32) -> Prepared:
    return prepare(
        list(map(str, inputs)),
        output,
        block_length=length,
        vocab_size=300,
        samples_per_shard=1,
        valid_share=share,
    )


def files(folder: Path, texts: list[str]) -> list[Path]:
    paths = [folder / f"{number}.txt" for number in range(len(texts))]
    for path, content in zip(paths, texts, strict=True):
        path.write_text(content)
    return paths


@pytest.mark.parametrize("size", [400, 30_000])
@pytest.mark.parametrize("seed", range(3))
def test_the_end_of_a_single_file_is_held_out(tmp_path: Path, size: int, seed: int) -> None:
    whole = text(seed, size)
    prepared = run(files(tmp_path, [whole]), tmp_path / "out")
    train, valid = (load_manifest(tmp_path / "out" / split) for split in ("train", "valid"))
    assert (train.documents, valid.documents, prepared.counts.documents) == (1, 1, 1)
    assert train.text_bytes + valid.text_bytes == len(whole)
    wanted = max(0.01 * len(whole), 8 * 33)
    assert wanted <= valid.text_bytes <= wanted + 1000
    assert "the end of the longest document" in str(prepared.held_out)
    (beginning,) = decoded_documents(tmp_path / "out" / "train")
    (end,) = decoded_documents(tmp_path / "out" / "valid")
    assert whole.startswith(beginning)
    assert whole[train.text_bytes :].startswith(end)


def test_two_equal_files_never_end_up_on_both_sides(tmp_path: Path) -> None:
    whole = text(0, 3000)
    run(files(tmp_path, [whole, whole]), tmp_path / "out")
    train, valid = (load_manifest(tmp_path / "out" / split) for split in ("train", "valid"))
    assert (train.documents, valid.documents) == (2, 2)
    assert train.text_bytes + valid.text_bytes == 2 * len(whole)
    (end, *_) = decoded_documents(tmp_path / "out" / "valid")
    assert end not in "".join(decoded_documents(tmp_path / "out" / "train"))


def test_short_documents_are_held_out_whole_even_beyond_the_share(tmp_path: Path) -> None:
    texts = [text(seed, 12) for seed in range(60)]  # about 70 bytes, and a sample takes 33 tokens
    prepared = run(files(tmp_path, texts), tmp_path / "out", share=1e-9)
    valid = load_manifest(tmp_path / "out" / "valid")
    assert 8 * 33 <= valid.text_bytes <= 2 * 8 * 33
    assert prepared.held_out == f"{valid.documents} whole documents"
    held_out = decoded_documents(tmp_path / "out" / "valid")[:-1]
    assert set(held_out) < set(texts)
    assert not set(held_out) & set(decoded_documents(tmp_path / "out" / "train"))


def test_too_little_text_is_said_before_the_work(tmp_path: Path) -> None:
    stages = []
    with raises_data_error("bytes in 1 documents", key="--sequence-length"):
        prepare(
            [str(*files(tmp_path, [text(0, 9)]))],
            tmp_path / "out",
            block_length=64,
            vocab_size=300,
            valid_share=0.5,
            progress=lambda what, done, total: stages.append(what),
        )
    assert set(stages) == {"reading the text"}


def test_held_out_text_does_not_train_the_tokenizer(tmp_path: Path) -> None:
    (file,) = files(tmp_path, ["abc " * 2000 + "xyz " * 200])
    prepared = run([file], tmp_path / "out", share=0.1)
    train, valid = prepared.manifests.values()
    assert train.text_bytes / train.tokens > 1.5 * valid.text_bytes / valid.tokens


def test_the_limit_applies_before_text_is_held_out(tmp_path: Path) -> None:
    (file,) = files(tmp_path, [text(0, 30_000)])
    prepared = prepare(
        [str(file)],
        tmp_path / "out",
        block_length=32,
        vocab_size=300,
        valid_share=0.1,
        text=TextOptions(max_bytes=20_000),
    )
    assert sum(manifest.text_bytes for manifest in prepared.manifests.values()) == 20_000
