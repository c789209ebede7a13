"""A shard is read as it was written; what is damaged or forged is met in `tests/bad_input`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moa_dist.data.manifest import Manifest
from moa_dist.data.shards import read_shard
from tests.raises import raises_data_error


def test_round_trip_and_webdataset_reads_it(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_shards(tmp_path)
    expected = np.repeat(np.arange(6, 12)[:, None], 4, axis=1)
    np.testing.assert_array_equal(read_shard(tmp_path, manifest, 1), expected)

    import webdataset as wds

    samples = list(wds.WebDataset(str(tmp_path / "shard-000001.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(6, 12)]
    assert np.frombuffer(samples[0]["tokens"], "<u2").tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("at", [0, 513, -1])
def test_one_altered_byte(make_shards: Callable[..., Manifest], tmp_path: Path, at: int) -> None:
    manifest = make_shards(tmp_path)
    file = tmp_path / "shard-000001.tar"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with raises_data_error("moa-dist prepare", path=file, key="sha256"):
        read_shard(tmp_path, manifest, 1)
