"""Shards on web servers and in buckets are read as if they were local, whatever servers do."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch

from moa_dist.config.data import DataConfig, SourceConfig
from moa_dist.data import cache, remote
from moa_dist.data.check import check_data
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import load_manifest, sha256_of
from moa_dist.data.places import local_path, mirror
from moa_dist.data.shards import read_shard
from moa_dist.data.stream import SampleStream, build_loader
from moa_dist.errors import DataError
from tests.data import s3
from tests.data.servers import FAULTS, FaultyServer
from tests.raises import raises_data_error
from tests.small_shards import write_folder

SHARD = "books/train/shard-000003.tar"
SECRET = "wJalrXUtnFEMI-a-secret"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, and no proxy."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 1e-3)
    monkeypatch.setattr(remote, "_PATIENCE_S", 2.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    write_folder(tmp_path / "served/books/train")
    with FaultyServer(tmp_path / "served").serving() as started:
        yield started


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Serve the folder as the bucket `text` of a real S3 server."""
    folder = tmp_path_factory.mktemp("bucket")
    write_folder(folder / "books/train")
    with s3.serving(folder, SECRET):
        yield folder


def config(tmp_path: Path, url: str, max_gb: float = 1.0, **fields: object) -> DataConfig:
    train = [{"path": url, "weight": 1, "name": "books"}]
    return DataConfig(
        train=train,
        sequence_length=3,
        readers=4,
        cache={"folder": str(tmp_path / "cache"), "max_gb": max_gb},
        **fields,
    )


def rows(
    folder: Path, stop: int, *, world_size: int = 1, workers: int = 0, first: int = 0
) -> torch.Tensor:
    """Global samples, as all ranks together see them."""
    ranks = []
    for rank in range(world_size):
        stream = SampleStream(
            [DataFolder("books", folder, load_manifest(folder))],
            readers=4,
            seed=1,
            rank=rank,
            world_size=world_size,
            consumed=first,
            micro_batch=1,
        )
        loader = build_loader(stream, workers=workers, timeout_s=60)
        ranks.append(torch.cat(list(islice(loader, (stop - first) // world_size))))
    return torch.stack(ranks, dim=1).flatten(0, 1)


def mirrored(data: DataConfig) -> Path:
    return mirror(data, data.sources[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(
    server: FaultyServer, tmp_path: Path, fault: str
) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    server.faults[SHARD] = [fault, "503"]
    manifest = load_manifest(folder)
    content = read_shard(folder, manifest, 3)
    assert (content == read_shard(server.folder / "books/train", manifest, 3)).all()
    assert server.requests[SHARD] == 3
    assert (folder / "shard-000003.tar").read_bytes() == (server.folder / SHARD).read_bytes()


@pytest.mark.parametrize("fault", [*FAULTS, "403", "404"])
def test_a_fault_that_stays_is_one_error_after_bounded_attempts(
    server: FaultyServer, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PATIENCE_S", 0.3)
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    server.faults[SHARD] = [fault] * 99
    if fault == "404":
        (server.folder / SHARD).unlink()
    file = folder / "shard-000003.tar"
    started = time.monotonic()
    key = "sha256" if fault in ("altered", "short") else None
    with raises_data_error(f"{server.url}/{SHARD}", path=file, key=key):
        read_shard(folder, load_manifest(folder), 3)
    assert time.monotonic() - started < 60
    assert server.requests[SHARD] == (1 if fault in ("403", "404") else remote._ATTEMPTS)
    assert not file.exists()


def test_all_attempts_together_end_in_bounded_time(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    monkeypatch.setattr(remote, "_TOTAL_S", 0.5)
    server.faults[SHARD] = ["stall"] * 99
    with raises_data_error(f"{server.url}/{SHARD}"):
        read_shard(folder, load_manifest(folder), 3)
    assert server.requests[SHARD] == 1  # with a patience of 2 s


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (4, 0)])
def test_a_failing_web_server_gives_the_order_of_a_local_folder(
    server: FaultyServer, tmp_path: Path, world_size: int, workers: int
) -> None:
    local = rows(server.folder / "books/train", 96)
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    choice = random.Random(world_size)
    kinds = [fault for fault in FAULTS if fault != "stall"]  # patience of a worker is a minute
    for shard in range(8):
        # A worker pauses for as long as users do.
        faults = choice.choices(kinds, k=1 if workers else 2)
        server.faults[f"books/train/shard-{shard:06d}.tar"] = faults
    assert torch.equal(rows(folder, 96, world_size=world_size, workers=workers), local)
    # Each shard was fetched once, by whichever rank or worker came first.
    counts = [server.requests[f"books/train/shard-{shard:06d}.tar"] for shard in range(8)]
    assert counts == [2 if workers else 3] * 8


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bucket_gives_the_order_of_a_local_folder(
    bucket: Path, tmp_path: Path, world_size: int
) -> None:
    data = config(tmp_path, "s3://text/books/train/")
    (found,), _ = check_data(data, vocab_size=48, world_size=1)
    assert found.manifest == load_manifest(bucket / "books/train")
    mixed = rows(found.path, 96, world_size=world_size)
    assert torch.equal(mixed, rows(bucket / "books/train", 96))


@pytest.mark.parametrize("missing", ["s3://nowhere/books/train", "s3://text/none"])
def test_what_is_missing_in_a_bucket_is_one_error(
    bucket: Path, tmp_path: Path, missing: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_data(config(tmp_path, missing), vocab_size=48, world_size=1)
    (cause,) = caught.value.causes
    assert f"{missing}/manifest.json" in str(cause)
    assert SECRET not in str(caught.value)


def test_a_bucket_without_credentials_is_one_error(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError) as caught:
        check_data(config(tmp_path, "s3://text/books/train"), vocab_size=48, world_size=1)
    s3fs.S3FileSystem.clear_instance_cache()
    (cause,) = caught.value.causes
    assert "AWS_ACCESS_KEY_ID" in str(cause)


def size_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue  # just removed
    return total


def test_the_cache_never_exceeds_its_limit(server: FaultyServer, tmp_path: Path) -> None:
    shard = (server.folder / SHARD).stat().st_size
    small = size_of(server.folder) - 8 * shard
    limit = small + int(3.5 * shard)
    folder = mirrored(config(tmp_path, f"{server.url}/books/train", max_gb=limit / 1e9))
    largest, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            largest[0] = max(largest[0], size_of(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        mixed = rows(folder, 240, world_size=2)
    finally:
        done.set()
        watcher.join()
    assert torch.equal(mixed, rows(server.folder / "books/train", 240))
    assert 2 * shard < largest[0] <= limit
    assert len(list(folder.glob("*.tar"))) == 3


def test_a_limit_without_room_for_a_manifest_is_an_error(
    server: FaultyServer, tmp_path: Path
) -> None:
    with raises_data_error("1e-08", key="data.cache.max_gb"):
        mirrored(config(tmp_path, f"{server.url}/books/train", max_gb=1e-8))


def test_the_least_recently_used_shards_make_room(server: FaultyServer, tmp_path: Path) -> None:
    shard = (server.folder / SHARD).stat().st_size
    limit = size_of(server.folder) - 8 * shard + 3 * shard + 1000
    folder = mirrored(config(tmp_path, f"{server.url}/books/train", max_gb=limit / 1e9))
    manifest = load_manifest(folder)
    for index in (0, 1, 2, 0, 3):
        read_shard(folder, manifest, index)
        time.sleep(0.02)
    assert sorted(file.name[-5] for file in folder.glob("*.tar")) == ["0", "2", "3"]


def test_a_full_disk_is_read_over(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    write = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if cache._PART in path.name:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert torch.equal(rows(folder, 48), rows(server.folder / "books/train", 48))
    assert not list(folder.glob("*.tar")) + list(folder.glob(f"{cache._PART}*"))
    (folder / "manifest.json").unlink()
    with raises_data_error("No space left", key="data.cache.folder"):
        mirrored(config(tmp_path, f"{server.url}/books/train"))


def test_what_a_kill_leaves_is_removed_and_damage_on_the_disk_is_fetched_again(
    server: FaultyServer, tmp_path: Path
) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    (folder / f"{cache._PART}shard-000001.tar").write_bytes(b"half")
    manifest = load_manifest(folder)
    first = read_shard(folder, manifest, 3)
    assert not list(folder.glob(f"{cache._PART}*"))
    os.truncate(folder / "shard-000003.tar", 700)
    assert (read_shard(folder, manifest, 3) == first).all()
    assert server.requests[SHARD] == 2


def test_a_cache_that_cannot_be_locked_is_read_over(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    monkeypatch.setattr(cache, "_WAIT_S", 0.05)
    local = rows(server.folder / "books/train", 48)
    with (tmp_path / "cache/.lock").open("ab") as held:  # by a process that is stopped
        fcntl.flock(held, fcntl.LOCK_EX)
        assert torch.equal(rows(folder, 48), local)
    shutil.rmtree(tmp_path / "cache/.locks")
    assert torch.equal(rows(folder, 48), local)


READER = """
import sys
from pathlib import Path
from moa_dist.data.manifest import load_manifest
from moa_dist.data.shards import read_shard

folder, first = Path(sys.argv[1]), int(sys.argv[2])
manifest = load_manifest(folder)
for turn in range(10**9):
    read_shard(folder, manifest, (first + 3 * turn) % 8)
    print(turn, flush=True)
"""


@pytest.mark.full
def test_readers_killed_at_any_instant_leave_a_cache_that_is_whole(
    server: FaultyServer, tmp_path: Path
) -> None:
    shard = (server.folder / SHARD).stat().st_size
    limit = size_of(server.folder) - 8 * shard + 3 * shard + 500
    data = config(tmp_path, f"{server.url}/books/train", max_gb=limit / 1e9)
    folder = mirrored(data)
    manifest, choice = load_manifest(folder), random.Random(0)
    for _ in range(5):
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(folder), str(first)], stdout=subprocess.PIPE
            )
            for first in (0, 1)
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"0\n"
            time.sleep(choice.uniform(0, 0.3))
            reader.kill()
            reader.communicate()
        assert size_of(tmp_path / "cache") <= limit
        for file in folder.glob("shard-*.tar"):  # a killed reader may leave half of one, hidden
            (entry,) = (entry for entry in manifest.shards if entry.file == file.name)
            assert sha256_of(file.read_bytes()) == entry.sha256
    assert torch.equal(rows(folder, 96), rows(server.folder / "books/train", 96))
    assert not list(folder.glob(f"{cache._PART}*"))


def test_ranks_of_a_node_fetch_a_shard_once(server: FaultyServer, tmp_path: Path) -> None:
    data = config(tmp_path, f"{server.url}/books/train")
    folder = mirrored(data)
    manifest = load_manifest(folder)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: read_shard(folder, manifest, 3), range(8)))
    assert server.requests[SHARD] == 1
    assert all((content == read[0]).all() for content in read)


def test_the_next_window_is_fetched_ahead(server: FaultyServer, tmp_path: Path) -> None:
    folder = mirrored(config(tmp_path, f"{server.url}/books/train"))
    rows(folder, 4)  # one sample of each of 4 readers
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.tar"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(folder.glob("*.tar"))) == 8


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_folder_from_someone_else_cannot_name_a_url(
    server: FaultyServer, tmp_path: Path, scheme: str
) -> None:
    url = {"file": f"file://{server.folder}", "http": server.url}[scheme] + "/books/train"
    place = local_path(config(tmp_path, url), SourceConfig(path=url, weight=1, name="books"))
    for folder in {"file": [place, tmp_path / "bait"], "http": [tmp_path / "bait"]}[scheme]:
        manifest = write_folder(folder)
        (folder.parent / ".locks").mkdir(exist_ok=True)
        origin = json.dumps([url, 10**9])
        (folder / "origin.json").write_text(origin)
        (folder / "shard-000003.tar").unlink()
        with raises_data_error(path=folder / "shard-000003.tar", key="file"):
            read_shard(folder, manifest, 3)
    assert not server.requests


def test_a_local_folder_is_itself_and_two_urls_are_two_places(tmp_path: Path) -> None:
    data = config(tmp_path, "s3://a/books/train")
    one, other = (SourceConfig(path=f"s3://{b}/books/train", weight=1) for b in "ab")
    assert local_path(data, one) != local_path(data, other)
    assert local_path(data, one) == local_path(data, one.changed(path="s3://a/books/train/"))
    assert local_path(data, SourceConfig(path="data/books", weight=1)) == Path("data/books")
