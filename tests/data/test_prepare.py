"""Prepared shards hold exactly the text, reproducibly, or nothing is left behind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from moa_dist.data import assembly as assembly_module
from moa_dist.data import corpus as corpus_module
from moa_dist.data import prepare as prepare_module
from moa_dist.data.manifest import Manifest, load_manifest, sha256_of
from moa_dist.data.prepare import Prepared, prepare
from moa_dist.data.shards import read_shard
from moa_dist.data.text_options import TextOptions
from moa_dist.data.tokenizer import load_tokenizer
from moa_dist.errors import DataError
from tests.raises import raises_data_error

BLANK_LINE = TextOptions("blank-line")


def run(text_file: Path, output: Path, **options: object) -> Prepared:
    defaults: dict[str, object] = {
        "block_length": 16,
        "vocab_size": 400,
        "samples_per_shard": 50,
        "text": BLANK_LINE,
    }
    return prepare([str(text_file)], output, **(defaults | options))  # type: ignore[arg-type]


def packed_tokens(folder: Path) -> list[int]:
    """The packed text again, from all samples in file order."""
    manifest = load_manifest(folder)
    shards = [read_shard(folder, manifest, index) for index in range(len(manifest.shards))]
    samples = np.concatenate(shards)
    np.testing.assert_array_equal(samples[1:, 0], samples[:-1, -1])  # they overlap by one
    return [int(samples[0, 0]), *samples[:, 1:].flatten().tolist()]


def decoded_documents(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    documents: list[list[int]] = [[]]
    for token in packed_tokens(folder):
        if token == tokenizer.end_of_document:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(ids) for ids in documents]


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def nothing_but(*names: str, folder: Path) -> bool:
    return sorted(entry.name for entry in folder.iterdir()) == sorted(names)


def test_packed_samples_are_the_shuffled_documents(
    text_file: Path, documents: list[str], tmp_path: Path
) -> None:
    run(text_file, tmp_path / "out", seed=1)
    *found, last = decoded_documents(tmp_path / "out")
    # Only the end is cut, to fill equal shards.
    assert any(document.startswith(last) for document in documents)
    assert set(found) < set(documents)
    assert len(found) == len(set(found))
    assert found != [document for document in documents if document in found]


def test_manifest_counts(text_file: Path, documents: list[str], tmp_path: Path) -> None:
    prepared = run(text_file, tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert prepared.manifests == {tmp_path / "out": manifest}
    tokenizer = load_tokenizer(tmp_path / "out")
    assert manifest.tokens == sum(len(tokenizer.encode(text)) + 1 for text in documents)
    assert manifest.text_bytes == sum(len(text.encode()) for text in documents)
    assert manifest.documents == len(documents) == prepared.counts.documents
    assert manifest.dropped_tokens == manifest.tokens - len(packed_tokens(tmp_path / "out"))
    assert manifest.dropped_tokens < 16 * len(manifest.shards) + 16
    assert manifest.samples_per_shard <= 50
    assert manifest.tokenizer_sha256 == sha256_of(
        (tmp_path / "out" / "tokenizer.json").read_bytes()
    )


def test_same_input_gives_the_same_bytes_and_another_seed_does_not(
    text_file: Path, tmp_path: Path
) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(text_file, tmp_path / name, seed=seed, valid_share=0.2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_stdin_gives_the_same_as_a_file(text_file: Path, tmp_path: Path) -> None:
    run(text_file, tmp_path / "file")
    prepare(
        ["-"],
        tmp_path / "stdin",
        block_length=16,
        vocab_size=400,
        samples_per_shard=50,
        text=BLANK_LINE,
        stdin=io.BytesIO(text_file.read_bytes()),
    )
    assert contents(tmp_path / "file") == contents(tmp_path / "stdin")


def test_validation_split_shares_the_tokenizer_but_no_document(
    documents: list[str], tmp_path: Path
) -> None:
    twice = tmp_path / "twice.txt"
    twice.write_text("\n\n".join(documents * 2), encoding="utf-8")
    prepared = run(twice, tmp_path / "out", valid_share=0.2)
    train, valid = (load_manifest(tmp_path / "out" / split) for split in ("train", "valid"))
    assert list(prepared.manifests.values()) == [train, valid]
    assert train.tokenizer_sha256 == valid.tokenizer_sha256
    assert train.documents + valid.documents == 300
    assert 20 <= valid.documents <= 100
    train_texts = set(decoded_documents(tmp_path / "out" / "train")[:-1])
    valid_texts = set(decoded_documents(tmp_path / "out" / "valid")[:-1])
    assert train_texts
    assert valid_texts
    assert not train_texts & valid_texts


def test_a_tokenizer_can_be_reused(text_file: Path, tmp_path: Path) -> None:
    run(text_file, tmp_path / "a")
    run(text_file, tmp_path / "b", tokenizer=tmp_path / "a" / "tokenizer.json", vocab_size=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_all_shards_are_equal_and_a_small_text_still_gets_several(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of the text\n" for n in range(3000)))
    manifest = _only(run(text, tmp_path / "small", samples_per_shard=4096))
    assert len(manifest.shards) == min(16, manifest.num_samples // 64) > 1
    manifest = _only(run(text, tmp_path / "target", samples_per_shard=10))
    assert manifest.samples_per_shard <= 10
    assert manifest.dropped_tokens < 16 * (len(manifest.shards) + 1)


def _only(prepared: Prepared) -> Manifest:
    (manifest,) = prepared.manifests.values()
    return manifest


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab")
    with raises_data_error("3 tokens", "1 documents", "17", key="--sequence-length"):
        run(text, tmp_path / "out", vocab_size=257)
    assert nothing_but("text.txt", folder=tmp_path)


MODULES = {
    "sample_text": corpus_module,
    "train_tokenizer": corpus_module,
    "tokenize": corpus_module,
    "write_shards": assembly_module,
    "save_manifest": assembly_module,
    "put_in_place": prepare_module,
}


def crash_in(monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(MODULES[step], step, crash)


@pytest.mark.parametrize("step", MODULES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_crash_leaves_no_output_and_the_next_run_continues(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    with monkeypatch.context() as patched:
        crash_in(patched, step, error)
        with pytest.raises(DataError if error is OSError else error):
            run(text_file, tmp_path / "out", valid_share=0.2)
    assert nothing_but(".out.partial", folder=tmp_path)
    run(text_file, tmp_path / "out", valid_share=0.2)
    assert nothing_but("out", folder=tmp_path)
    run(text_file, tmp_path / "at-once", valid_share=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def test_a_crash_keeps_the_data_that_force_would_have_replaced(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(text_file, tmp_path / "out")
    before = contents(tmp_path / "out")
    crash_in(monkeypatch, "save_manifest", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(text_file, tmp_path / "out", seed=9, force=True)
    assert contents(tmp_path / "out") == before
    assert nothing_but("out", ".out.partial", folder=tmp_path)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "data"])
def test_an_output_that_is_a_link_is_written_where_it_leads(
    text_file: Path, tmp_path: Path, before: str
) -> None:
    """As `data` often leads to a larger disk; the link stays."""
    disk, output = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    output.symlink_to(disk / "data")
    if before != "nothing":
        (disk / "data").mkdir()
    if before == "data":
        run(text_file, output, seed=9)
    run(text_file, output, force=True)
    assert output.is_symlink()
    assert nothing_but("data", folder=disk)
    run(text_file, tmp_path / "plain")
    assert contents(disk / "data") == contents(tmp_path / "plain")


def test_existing_data_is_replaced_only_with_force(text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    run(text_file, output)  # an empty folder is no obstacle
    with raises_data_error(path=output, key="--force"):
        run(text_file, output)
    run(text_file, output, valid_share=0.2, force=True)
    assert nothing_but("train", "valid", folder=output)
    assert nothing_but("out", folder=tmp_path)


@pytest.mark.parametrize("name", ["thesis.doc", "train/notes.txt"])
def test_not_even_force_deletes_files_of_others(text_file: Path, tmp_path: Path, name: str) -> None:
    run(text_file, tmp_path / "out", valid_share=0.2)
    (tmp_path / "out" / name).touch()
    with raises_data_error(path=tmp_path / "out", key="--output"):
        run(text_file, tmp_path / "out", force=True)
    assert (tmp_path / "out" / name).exists()


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({"block_length": 0}, "--sequence-length", 0),
        ({"samples_per_shard": 0}, "--samples-per-shard", 0),
        ({"valid_share": 1.0}, "--valid-share", 1.0),
        ({"seed": -1}, "--seed", -1),
        ({"text": TextOptions(max_bytes=0)}, "--max-bytes", 0),
        ({"vocab_size": 10}, "--vocab-size", 257),
    ],
)
def test_impossible_options(
    text_file: Path, tmp_path: Path, options: dict[str, object], key: str, value: float
) -> None:
    with raises_data_error(f"{key} {value}", key=key):
        run(text_file, tmp_path / "out", **options)
    assert nothing_but(folder=tmp_path)
