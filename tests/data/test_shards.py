"""A shard is read only if it is exactly what the manifest says."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moa_dist.data.manifest import Manifest, sha256_of
from moa_dist.data.shards import read_shard
from moa_dist.errors import DataError

Members = list[tuple[str, bytes]]


def tampered(folder: Path, manifest: Manifest, change: Callable[[Members], Members]) -> Manifest:
    """Shard 1 rewritten with other members, and a manifest whose checksum agrees."""
    file = folder / manifest.shards[1].file
    with tarfile.open(file) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(file, "w") as tar:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return with_checksum_of(folder, manifest)


def with_checksum_of(folder: Path, manifest: Manifest) -> Manifest:
    content = (folder / manifest.shards[1].file).read_bytes()
    entry = manifest.shards[1].model_copy(
        update={"sha256": sha256_of(content), "bytes": len(content)}
    )
    shards = (manifest.shards[0], entry, *manifest.shards[2:])
    return manifest.model_copy(update={"shards": shards})


def refused(folder: Path, manifest: Manifest, problem: str) -> None:
    with pytest.raises(DataError, match=rf"shard-000001\.tar: .*{problem}.*prepare again"):
        read_shard(folder, manifest, 1)


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


def test_missing(make_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    refused(tmp_path, manifest, "missing")
    os.mkfifo(tmp_path / "shard-000001.tar")  # must not wait for a writer
    refused(tmp_path, manifest, "missing")


def test_truncated(make_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    os.truncate(tmp_path / "shard-000001.tar", manifest.shards[1].bytes // 2)
    refused(tmp_path, manifest, "cut off")
    refused(tmp_path, with_checksum_of(tmp_path, manifest), "samples instead of 6|not a tar")


@pytest.mark.parametrize("at", [0, 513, -1])
def test_one_altered_byte(make_shards: Callable[..., Manifest], tmp_path: Path, at: int) -> None:
    manifest = make_shards(tmp_path)
    file = tmp_path / "shard-000001.tar"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    refused(tmp_path, manifest, "checksum")


def test_not_a_tar(make_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    (tmp_path / "shard-000001.tar").write_bytes(b"something else" * 100)
    refused(tmp_path, with_checksum_of(tmp_path, manifest), "not a tar archive")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: [*m[:2], (m[2][0], m[2][1][:-2]), *m[3:]], "has 6 bytes instead of 8"),
        (lambda m: m[:-1], "5 samples instead of 6"),
        (lambda m: [*m, m[-1]], "where the end should be"),
        (lambda m: [m[1], m[0], *m[2:]], "'000000007.tokens' where 000000006.tokens should be"),
        (lambda m: [("sub/" + m[0][0], m[0][1]), *m[1:]], "'sub/000000006.tokens' where"),
        (
            lambda m: [*m[:5], (m[5][0], np.full(4, 48, "<u2").tobytes())],
            "token id 48 is outside the vocabulary of 48",
        ),
    ],
)
def test_wrong_members(
    make_shards: Callable[..., Manifest],
    tmp_path: Path,
    change: Callable[[Members], Members],
    problem: str,
) -> None:
    manifest = make_shards(tmp_path)
    refused(tmp_path, tampered(tmp_path, manifest, change), problem)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pth"])
def test_a_pickle_is_refused_and_never_run(
    make_shards: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    manifest = make_shards(tmp_path / "shards")
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = (f"000000006.{suffix}", pickle.dumps(_Bomb()))
    changed = tampered(tmp_path / "shards", manifest, lambda m: [bomb, *m[1:]])
    refused(tmp_path / "shards", changed, f"member '000000006.{suffix}' where")
    assert not (tmp_path / "exploded").exists()
