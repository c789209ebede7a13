"""Ranks agree on which shards are damaged, whoever reads them, or all stop with the same error."""

import os

import pytest

from moa_dist.config.run import DataConfig
from moa_dist.data.check import SKIP_REMEDY
from moa_dist.data.corruption import find_corrupt_shards
from moa_dist.data.manifest import Manifest
from moa_dist.errors import DataError
from tests.small_shards import write_folder

NUM_SHARDS = 40  # more than two ranks read in one round


def damage(folder, *shards: int) -> None:
    """Every way in turn: gone, cut off, and altered in a byte at the same size."""
    for number, shard in enumerate(shards):
        file = folder / f"shard-{shard:06d}.tar"
        if number % 3 == 0:
            file.unlink()
        elif number % 3 == 1:
            os.truncate(file, 600)
        else:
            content = bytearray(file.read_bytes())
            content[515] ^= 1
            file.write_bytes(content)


def find(data: DataConfig, train: Manifest, valid: Manifest | None):
    """On a rank: what it found, or the error's message."""
    try:
        return find_corrupt_shards(data, train, valid)
    except DataError as error:
        return str(error)


@pytest.fixture
def run(tmp_path, pools):
    train, valid = (write_folder(tmp_path / part, NUM_SHARDS) for part in ("train", "valid"))

    def on_two_ranks(**fields):
        data = DataConfig(
            train=str(tmp_path / "train"),
            valid=str(tmp_path / "valid"),
            sequence_length=3,
            **({"verify": "checksums", "on_damage": "skip"} | fields),
        )
        first, second = pools(2).run(find, data, train, valid)
        assert first == second
        return first

    return on_two_ranks


def test_whole_data_has_no_damage(run):
    assert run() == run(on_damage="stop") == {}


def test_all_ranks_leave_out_what_any_of_them_found(run, tmp_path):
    damage(tmp_path / "train", 39, 4, 7)
    damaged = run()
    assert list(damaged) == [4, 7, 39]
    assert all(f"shard-{shard:06d}.tar" in problem for shard, problem in damaged.items())
    assert "600 bytes" in damaged[4]


def test_stop_names_the_shards_and_the_remedies(run, tmp_path):
    damage(tmp_path / "train", *range(8))
    message = run(on_damage="stop").splitlines()
    assert len(message) == 7
    assert message[0].startswith(str(tmp_path / "train/shard-000000.tar"))
    assert "3" in message[5]
    assert message[6] == SKIP_REMEDY


def test_nothing_is_read_for_sizes_alone(run, tmp_path):
    damage(tmp_path / "train", 0, 1, 2)
    assert run(verify="sizes", on_damage="stop") == {}


def test_validation_data_is_never_left_out(run, tmp_path):
    damage(tmp_path / "valid", 9)
    assert "valid/shard-000009.tar" in run()


def test_no_whole_shard_is_an_error(run, tmp_path):
    damage(tmp_path / "train", *range(NUM_SHARDS))
    message = run().splitlines()
    assert message[-1].startswith(f"{tmp_path / 'train'}: ")
    assert message[-1] != SKIP_REMEDY
