"""Ranks agree on which shards are damaged, whoever reads them, or all stop with the same error."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from moa_dist.config.run import DataConfig
from moa_dist.data.check import SKIP_REMEDY
from moa_dist.data.corruption import find_corrupt_shards
from moa_dist.data.folders import DataFolder, RunData
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


class Problem(NamedTuple):
    """What a DataError says; unlike errors of two ranks, two of them can be compared."""

    path: Path | None
    key: str | None
    text: str


def problem(error: DataError) -> Problem:
    return Problem(error.path, error.key, str(error))


class Stopped(NamedTuple):
    """An error that reports several problems."""

    text: str
    causes: list[Problem]


def find(data: DataConfig, folders: RunData) -> dict[int, Problem] | Stopped:
    """On a rank: what it found, or the error."""
    try:
        found = find_corrupt_shards(data, folders)["train"]
    except DataError as error:
        return Stopped(str(error), [problem(cause) for cause in error.causes])
    return {shard: problem(error) for shard, error in found.items()}


@pytest.fixture
def run(tmp_path, pools):
    folders = RunData(
        *(
            (DataFolder(part, tmp_path / part, write_folder(tmp_path / part, NUM_SHARDS)),)
            for part in ("train", "valid")
        )
    )

    def on_two_ranks(**fields):
        data = DataConfig(
            train=str(tmp_path / "train"),
            valid=str(tmp_path / "valid"),
            sequence_length=3,
            **({"verify": "checksums", "on_damage": "skip"} | fields),
        )
        first, second = pools(2).run(find, data, folders)
        assert first == second
        return first

    return on_two_ranks


def test_whole_data_has_no_damage(run):
    assert run() == run(on_damage="stop") == {}


def shard(folder, number: int):
    return folder / f"shard-{number:06d}.tar"


def test_all_ranks_leave_out_what_any_of_them_found(run, tmp_path):
    damage(tmp_path / "train", 39, 4, 7)
    damaged = run()
    assert list(damaged) == [4, 7, 39]
    assert all(found.path == shard(tmp_path / "train", n) for n, found in damaged.items())
    assert [found.key for found in damaged.values()] == ["bytes", "sha256", "file"]
    assert "600 bytes" in damaged[4].text


def test_stop_names_the_shards_and_the_remedies(run, tmp_path):
    damage(tmp_path / "train", *range(8))
    stopped = run(on_damage="stop")
    *damaged, remedy = stopped.causes
    assert [found.path for found in damaged] == [shard(tmp_path / "train", n) for n in range(8)]
    assert [found.key for found in damaged] == (["file", "bytes", "sha256"] * 3)[:8]
    assert remedy == (None, "data.on_damage", SKIP_REMEDY)
    *named, more, last = stopped.text.splitlines()
    assert [*named, last] == [found.text for found in (*damaged[:5], remedy)]
    assert re.findall(r"\d+", more) == ["3"]  # not named


def test_nothing_is_read_for_sizes_alone(run, tmp_path):
    damage(tmp_path / "train", 0, 1, 2)
    assert run(verify="sizes", on_damage="stop") == {}


def test_validation_data_is_never_left_out(run, tmp_path):
    damage(tmp_path / "valid", 9)
    (found,) = run().causes
    assert (found.path, found.key) == (shard(tmp_path / "valid", 9), "file")


def test_no_whole_shard_is_an_error(run, tmp_path):
    damage(tmp_path / "train", *range(NUM_SHARDS))
    stopped = run()
    assert len(stopped.causes) == NUM_SHARDS + 1
    last = stopped.causes[-1]
    assert (last.path, last.key) == (tmp_path / "train", None)
    assert stopped.text.endswith(last.text)
