"""Everything that does not fit is found before training, all at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_dist.config.run import DataConfig
from moa_dist.data.check import SKIP_REMEDY, check_data
from moa_dist.data.manifest import Manifest, save_manifest
from moa_dist.errors import DataError


def config(folder: Path, sequence_length: int = 3, readers: int = 4) -> DataConfig:
    return DataConfig(
        train=str(folder / "train"),
        valid=str(folder / "valid"),
        sequence_length=sequence_length,
        readers=readers,
    )


def test_good_data_gives_its_manifests(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    made = make_shards(tmp_path / "train"), make_shards(tmp_path / "valid")
    assert check_data(config(tmp_path), vocab_size=48, world_size=2) == made
    without = config(tmp_path).model_copy(update={"valid": None})
    assert check_data(without, vocab_size=48, world_size=2) == (made[0], None)


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


def test_damaged_training_shards_are_left_to_the_policy(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    made = make_shards(tmp_path / "train"), make_shards(tmp_path / "valid")
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
