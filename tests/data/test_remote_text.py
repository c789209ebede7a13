"""Text in buckets and on web servers is read as if it were local; ranges name what is missing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from moa_dist.data import remote
from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.prepare import prepare
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.data import s3
from tests.data.servers import FAULTS, FaultyServer
from tests.raises import raises_data_error

TEXTS = [f"document {n} of the corpus, with some words in it" for n in range(40)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, and no proxy."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 1e-3)
    monkeypatch.setattr(remote, "_PATIENCE_S", 2.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards that webdataset wrote, and other files."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "web").mkdir()
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"web/s-{shard:05d}.tar")) as sink:
            for n in range(10 * shard, 10 * shard + 10):
                sink.write({"__key__": f"{n:06d}", "json": {"text": TEXTS[n]}})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "web/lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "web/picture.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "web/.hidden.txt").write_text("hidden")
    return folder


@pytest.fixture
def server(corpus: Path) -> Iterator[FaultyServer]:
    with FaultyServer(corpus).serving() as started:
        yield started


@pytest.fixture(scope="module")
def bucket(corpus: Path) -> Iterator[str]:
    """Serve the corpus from a real S3 server; returns the bucket's URL."""
    with s3.serving(corpus):
        yield "s3://text"


def read(url: str, tmp_path: Path) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    files = find_files([url], None, tmp_path / "stdin", counts.left_out)
    documents = read_documents(files, TextOptions(), counts)
    return ["".join(pieces) for pieces in documents], counts


@pytest.mark.parametrize("name", ["web/s-{00000..00003}.tar", "web/lines.jsonl.gz"])
def test_a_web_server(server: FaultyServer, tmp_path: Path, name: str, corpus: Path) -> None:
    documents, counts = read(f"{server.url}/{name}", tmp_path)
    assert documents == TEXTS
    assert counts.input_bytes == sum(
        file.stat().st_size for file in corpus.glob(name.replace("{00000..00003}", "*"))
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["web/s-{00000..00003}.tar", "web/s-0000{0,1,2,3}.tar", "web/lines.jsonl.gz"]
)
def test_a_bucket(bucket: str, tmp_path: Path, name: str) -> None:
    assert read(f"{bucket}/{name}", tmp_path)[0] == TEXTS


@pytest.mark.parametrize("url", ["web", "web/"])
def test_a_folder_of_a_bucket(bucket: str, tmp_path: Path, url: str) -> None:
    left_out = LeftOut()
    files = find_files([f"{bucket}/{url}"], None, tmp_path / "stdin", left_out)
    names = ["lines.jsonl.gz", *(f"s-0000{n}.tar" for n in range(4))]
    assert [str(file) for file in files] == [f"{bucket}/web/{name}" for name in names]
    assert left_out.counts == {"hidden": 1, "of unknown kind": 1}
    assert left_out.names["of unknown kind"] == [f"{bucket}/web/picture.jpg"]


def test_prepared_from_a_bucket_it_is_the_same_byte_for_byte(
    bucket: str, corpus: Path, tmp_path: Path
) -> None:
    outputs = []
    for n, place in enumerate([bucket, str(corpus)]):
        outputs.append(tmp_path / str(n))
        prepare(
            [f"{place}/web/s-{{00000..00003}}.tar"],
            outputs[-1],
            block_length=8,
            vocab_size=300,
            valid_share=0.2,
        )
    here, there = (
        {file.relative_to(output): file.read_bytes() for file in output.rglob("*.*")}
        for output in outputs
    )
    assert here == there
    assert len(here) >= 6


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "altered"])
def test_a_fault_that_passes_changes_nothing(
    server: FaultyServer, tmp_path: Path, fault: str
) -> None:
    url = f"{server.url}/web/s-00001.tar"
    files = find_files([url], None, tmp_path / "stdin")
    server.faults["web/s-00001.tar"] = [fault, "503"]
    counts = TextCounts()
    documents = ["".join(d) for d in read_documents(files, TextOptions(), counts)]
    assert documents == TEXTS[10:20]


def test_a_member_of_a_remote_archive_is_named_by_its_url(
    server: FaultyServer, tmp_path: Path
) -> None:
    files = find_files([f"{server.url}/web/s-00001.tar"], None, tmp_path / "stdin")
    with raises_data_error(f"{server.url}/web/s-00001.tar/000010.json", key="body"):
        list(read_documents(files, TextOptions(json_field="body"), TextCounts()))


@pytest.mark.parametrize("where", ["here", "web server", "bucket"])
def test_half_a_brace_range(
    where: str, corpus: Path, server: FaultyServer, bucket: str, tmp_path: Path
) -> None:
    place = {"here": str(corpus), "web server": server.url, "bucket": bucket}[where]
    name = f"{place}/web/s-{{00002..00009}}.tar"
    names = [f"{place}/web/s-0000{n}.tar" for n in (4, 8)]
    with raises_data_error("6 of 8 files are missing", *names, "and 1 more", key=name) as caught:
        find_files([name], None, tmp_path / "stdin")
    assert f"{place}/web/s-00003.tar" not in str(caught.value)


@pytest.mark.parametrize("name", ["a{00..03.tar", "a{0..2000000}.tar"])
@pytest.mark.parametrize("place", ["/corpus", "s3://text"])
def test_a_range_that_is_none(tmp_path: Path, place: str, name: str) -> None:
    with raises_data_error(f"{place}/{name}", key=f"{place}/{name}"):
        find_files([f"{place}/{name}"], None, tmp_path / "stdin")


def test_a_file_whose_name_has_braces_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "a{0..9}.txt"
    file.write_text("text")
    assert find_files([str(file)], None, tmp_path / "stdin") == [file]


def test_what_does_not_exist(bucket: str, server: FaultyServer, tmp_path: Path) -> None:
    for url in (f"{bucket}/nothing.tar", "s3://no-such-bucket/a.tar", f"{server.url}/a.tar"):
        with raises_data_error(url, "no such file", key=url):
            find_files([url], None, tmp_path / "stdin")


def test_what_may_not_be_read(server: FaultyServer, tmp_path: Path) -> None:
    url = f"{server.url}/web/s-00001.tar"
    server.faults["web/s-00001.tar"] = ["403"] * 9
    with raises_data_error(url, "no permission"):
        find_files([url], None, tmp_path / "stdin")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/a.tar", "https://me:secret@host/a.tar", "s3://a/b?k=secret"],
)
def test_urls_that_are_refused_are_not_repeated(tmp_path: Path, url: str) -> None:
    with raises_data_error(url.partition("://")[0], key="--input") as caught:
        find_files([url], None, tmp_path / "stdin")
    assert "secret" not in str(caught.value)
