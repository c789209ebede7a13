"""Everything that does not fit is found before training, all at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_dist.config.data import DataConfig, FolderConfig, SourceConfig
from moa_dist.data.check import SKIP_REMEDY, check_data
from moa_dist.data.folders import DataFolder, RunData
from moa_dist.data.manifest import Manifest, save_manifest
from moa_dist.errors import DataError


def config(folder: Path, sequence_length: int = 3, readers: int = 4) -> DataConfig:
    return DataConfig(
        train=str(folder / "train"),
        valid=str(folder / "valid"),
        sequence_length=sequence_length,
        readers=readers,
    )


def make_both(make_shards: Callable[..., Manifest], folder: Path) -> RunData:
    train, valid = (
        (DataFolder(name, folder / name, make_shards(folder / name)),)
        for name in ("train", "valid")
    )
    return RunData(train, valid)


def test_good_data_gives_its_manifests(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    made = make_both(make_shards, tmp_path)
    assert check_data(config(tmp_path), vocab_size=48, world_size=2) == made
    without = config(tmp_path).model_copy(update={"valid": None})
    assert check_data(without, vocab_size=48, world_size=2) == (made.train, ())


def test_all_problems_are_named_at_once(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_shards(tmp_path / "train")
    (tmp_path / "train" / "shard-000003.tar").unlink()
    os.truncate(tmp_path / "train" / "shard-000004.tar", 7)
    with pytest.raises(DataError) as caught:
        check_data(config(tmp_path, sequence_length=9), vocab_size=40, world_size=3)
    train, causes = tmp_path / "train", caught.value.causes
    assert [(cause.path, cause.key) for cause in causes] == [
        (None, "data.readers"),
        (train, "data.sequence_length"),
        (train, "model.vocab_size"),
        (train / "shard-000003.tar", "file"),
        (train / "shard-000004.tar", "bytes"),
        (None, "data.on_damage"),
        (tmp_path / "valid", None),
    ]
    values = [("4", "3"), ("3", "9"), ("48", "40"), (), ("7",), (SKIP_REMEDY,), ()]
    for cause, expected in zip(causes, values, strict=True):
        assert all(value in str(cause) for value in expected)
    assert str(caught.value).splitlines() == list(map(str, causes))


def test_validation_data_of_another_tokenizer(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_shards(tmp_path / "train")
    other = make_shards(tmp_path / "valid").model_copy(update={"tokenizer_sha256": "1" * 64})
    save_manifest(other, tmp_path / "valid")
    with pytest.raises(DataError) as caught:
        check_data(config(tmp_path), vocab_size=48, world_size=1)
    found = [(cause.path, cause.key) for cause in caught.value.causes]
    assert (tmp_path / "valid", "tokenizer_sha256") in found


def test_every_source_is_checked_and_all_have_one_tokenizer(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    data = config(tmp_path).model_copy(
        update={
            "train": tuple(
                SourceConfig(path=str(tmp_path / name), weight=1)
                for name in ("books", "other", "missing")
            ),
            "valid": (FolderConfig(path=str(tmp_path / "books"), name="held-out"),),
        }
    )
    make_shards(tmp_path / "books")
    other = make_shards(tmp_path / "other").model_copy(update={"tokenizer_sha256": "1" * 64})
    save_manifest(other, tmp_path / "other")
    with pytest.raises(DataError) as caught:
        check_data(data, vocab_size=48, world_size=1)
    found = [(cause.path, cause.key) for cause in caught.value.causes]
    assert (tmp_path / "missing", None) in found
    assert found.count((tmp_path / "other", "tokenizer_sha256")) == 1
    assert all(path != tmp_path / "books" for path, _ in found)

    made = make_shards(tmp_path / "other"), make_shards(tmp_path / "missing", num_shards=3)
    train, valid = check_data(data, vocab_size=48, world_size=1)
    assert [folder.name for folder in (*train, *valid)] == [
        "books", "other", "missing", "held-out",
    ]  # fmt: skip
    assert [folder.manifest for folder in train[1:]] == list(made)


def test_damaged_training_shards_are_left_to_the_policy(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    made = make_both(make_shards, tmp_path)
    (tmp_path / "train" / "shard-000003.tar").unlink()
    data = config(tmp_path).model_copy(update={"verify": "checksums", "on_damage": "skip"})
    assert check_data(data, vocab_size=48, world_size=2) == made
    (tmp_path / "valid" / "shard-000002.tar").unlink()
    with pytest.raises(DataError) as caught:
        check_data(data, vocab_size=48, world_size=2)
    (cause,) = caught.value.causes
    assert (cause.path, cause.key) == (tmp_path / "valid" / "shard-000002.tar", "file")


def test_the_tokenizer_beside_the_shards_must_be_theirs(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_shards(tmp_path / "train")
    make_shards(tmp_path / "valid")
    (tmp_path / "train" / "tokenizer.json").write_text("{ }")
    (tmp_path / "valid" / "tokenizer.json").unlink()
    with pytest.raises(DataError) as caught:
        check_data(config(tmp_path), vocab_size=48, world_size=1)
    assert [(cause.path, cause.key) for cause in caught.value.causes] == [
        (tmp_path / "train" / "tokenizer.json", "tokenizer_sha256"),
        (tmp_path / "valid" / "tokenizer.json", None),
    ]
