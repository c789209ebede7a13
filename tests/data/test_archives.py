"""Tar archives and webdataset shards are read member by member, one document for each sample."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import webdataset

from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.raises import raises_data_error

Members = Iterable[tuple[str, bytes]]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def tar(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read(file: Path, **options: Any) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    documents = read_documents([file], TextOptions(**options), counts)
    return ["".join(pieces) for pieces in documents], counts


def as_json(text: str) -> bytes:
    return json.dumps({"text": text, "meta": {"body": f"body of {text}"}}).encode()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst", "a", "a.bin.gz"])
def test_shards_that_webdataset_wrote(tmp_path: Path, name: str) -> None:
    plain, file = tmp_path / "plain.tar", tmp_path / name
    with webdataset.TarWriter(str(plain)) as sink:
        for n in range(300):
            meta = {"text": f"text {n}", "meta": {"body": f"body {n}"}}
            sink.write({"__key__": f"{n:06d}", "json": meta, "jpg": b"\xff\xd8\xff"})
    suffix = {".tgz": ".gz"}.get(file.suffix, file.suffix)
    file.write_bytes(COMPRESS[suffix if suffix in COMPRESS else ""](plain.read_bytes()))
    documents, counts = read(file)
    assert documents == [f"text {n}" for n in range(300)]
    assert counts.left_out.counts == {"of unknown kind": 300}
    assert counts.left_out.names["of unknown kind"][0] == str(file / "000000.jpg")
    assert counts.input_bytes == file.stat().st_size
    assert read(file, json_field="meta.body")[0] == [f"body {n}" for n in range(300)]


def test_every_kind_of_text_in_one_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    lines = as_json("three") + b"\n" + as_json("four") + b"\n"
    members = [
        ("./docs/", b""),
        ("./docs/1.txt", "eins, \u00e9\n\nzwei".encode()),
        ("./docs/2.jsonl", lines),
        ("3.json.gz", gzip.compress(as_json("five"))),
        ("4.txt", b"  \n"),
        ("part-00000", b"no suffix"),
        ("/5.csv", b"id,text\n1,six\n"),
        ("main.c", b"int main;"),
        ("main.h", b"int f();"),
    ]
    other = [("._1.txt", b"x"), ("inner.tar", tar([])), ("b.zip", b"PK"), ("binary", b"\0\1" * 99)]
    file.write_bytes(tar([*members, *other]))
    documents, counts = read(file)
    assert documents == [
        "eins, \u00e9\n\nzwei", "three", "four", "five", "no suffix", "six", "int main;", "int f();"
    ]  # fmt: skip
    assert (counts.documents, counts.empty) == (8, 1)
    assert counts.left_out.counts == {
        "hidden": 1,
        "archives in archives, to unpack first": 1,
        "archives, to unpack first": 1,
        "of unknown kind": 1,
    }
    assert read(file, documents="blank-line")[0][:2] == ["eins, \u00e9", "zwei"]


@pytest.mark.parametrize("first", ["txt", "json"])
def test_a_sample_is_one_document(tmp_path: Path, first: str) -> None:
    file = tmp_path / "a.tar"
    members = []
    for n in range(3):
        both = [(f"{n}.txt", b"text %d" % n), (f"{n}.meta.json", as_json(f"json {n}"))]
        members += both if first == "txt" else both[::-1]
    file.write_bytes(tar([*members, ("3.json", as_json("json 3"))]))
    documents, counts = read(file)
    assert documents == ["text 0", "text 1", "text 2", "json 3"]
    assert counts.left_out.counts == {"JSON next to a text": 3}
    documents, counts = read(file, json_field="text")
    assert documents == ["json 0", "json 1", "json 2", "json 3"]
    assert counts.left_out.counts == {"texts next to JSON": 3}


def test_names_that_only_look_like_one_sample_are_all_read(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(tar((f"v1.{n}.json", as_json(str(n))) for n in range(100)))
    assert read(file)[0] == [str(n) for n in range(100)]
    file.write_bytes(tar((f"v1.{n}.txt", str(n).encode()) for n in range(100)))
    assert read(file)[0] == [str(n) for n in range(100)]


def test_a_member_larger_than_memory_allows_goes_through_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_dist.data.archives._IN_MEMORY_BYTES", 1000)
    file, long = tmp_path / "a.tar", "words " * 10_000
    file.write_bytes(tar([("1.txt", long.encode()), ("2.json", as_json(long))]))
    assert read(file)[0] == [long, long]


def test_a_bad_member_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(tar([("0.json", as_json("one")), ("1.json", b'{"body": "x"}')]))
    with raises_data_error("no field 'text'", path=file / "1.json", line=1, key="text"):
        read(file)
    documents, counts = read(file, bad_lines="skip")
    assert (documents, counts.bad_lines) == (["one"], 1)
    file.write_bytes(tar([("0.txt", b"caf\xe9")]))
    with raises_data_error("not UTF-8", path=file / "0.txt"):
        read(file)
    file.write_bytes(tar([("0.json.gz", gzip.compress(as_json("one"))[:-9])]))
    with raises_data_error("cannot be read", path=file / "0.json.gz"):
        read(file)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_headers(tmp_path: Path, format: int) -> None:
    file, name = tmp_path / "a", f"{'d' * 90}/1.txt"
    file.write_bytes(tar([(name, b"text")], format))
    assert read(file)[0] == ["text"]


WHOLE = tar((f"{n}.txt", b"text" * 200) for n in range(20))
DAMAGE = {
    "cut in a member": WHOLE[: 1536 * 10 + 700],
    "cut in a header": WHOLE[: 1536 * 10 + 300],
    "cut between members": WHOLE[: 1536 * 10],
    "a header overwritten": WHOLE[: 1536 * 10] + b"x" * 512 + WHOLE[1536 * 10 + 512 :],
    "two archives, one after the other": WHOLE + WHOLE,
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_never_ends_an_archive_in_silence(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    assert len(WHOLE) > 1536 * 20
    file = tmp_path / f"a.tar{suffix}"
    file.write_bytes(COMPRESS[suffix](content))
    with raises_data_error("truncated or damaged", path=file):
        read(file)


def test_damage_of_the_compression_after_the_last_member_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    file.write_bytes(gzip.compress(WHOLE)[:-4])
    with raises_data_error("cannot be read", path=file):
        read(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, tar([("a.jpg", b"\xff\xd8\xff")])])
def test_an_archive_without_text(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(content)
    with raises_data_error():
        read(file)


def test_links_are_not_followed(tmp_path: Path) -> None:
    file, out = tmp_path / "a.tar", io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("a.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("../b.txt"))
    file.write_bytes(out.getvalue())
    counts = TextCounts()
    with raises_data_error("holds no text"):
        list(read_documents([file], TextOptions(), counts))
    assert counts.left_out.counts == {"not regular files": 3, "hidden": 1}
