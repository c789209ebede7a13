"""Every kind of input is read as what it is, or refused by name; nothing is dropped in silence."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.raises import raises_data_error

ROWS: list[dict[str, Any]] = [
    {"text": 'one "quoted", and\na second line', "url": "https://example.org/1"},
    {"text": "two\u2028é🚢", "score": float("nan")},
    {"text": "three", "meta": {"source": "test", "list": [1, {"text": "no"}]}},
]
TEXTS = [row["text"] for row in ROWS]


def read(file: Path, **options: Any) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    documents = read_documents([file], TextOptions(**options), counts)
    return ["".join(pieces) for pieces in documents], counts


def json_lines(rows: list[dict[str, Any]] = ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv(delimiter: str, quote: bool = True) -> str:
    cell = '"one ""quoted"", and\na second line"' if quote else "one"
    return "".join(f"{n}{delimiter}{t}\n" for n, t in [("id", "text"), (1, cell), (2, "two")])


JSON = {
    "json lines": json_lines(),
    "an array": json.dumps(ROWS),
    "an indented array": json.dumps(ROWS, indent=2),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without a space": "".join(map(json.dumps, ROWS)),
    "a lost line end": json_lines(ROWS[:2]).rstrip("\n") + json_lines(ROWS[2:]),
    "a byte order mark": "\ufeff" + json_lines(),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.txt", "part-00000", "a.dump.xz"])
def test_json_is_read_by_content_whatever_its_name(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_bytes(COMPRESS[file.suffix if file.suffix in COMPRESS else ""](content.encode()))
    documents, counts = read(file)
    assert documents == TEXTS
    assert (counts.documents, counts.bad_lines, counts.empty) == (3, 0, 0)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("named", [True, False])
def test_compression_is_recognized_by_content(tmp_path: Path, suffix: str, named: bool) -> None:
    file = tmp_path / (f"a.jsonl{suffix}" if named else "a.jsonl")
    file.write_bytes(COMPRESS[suffix](json_lines().encode()))
    assert read(file)[0] == TEXTS


def test_zstd_in_several_frames_and_cut_off(tmp_path: Path) -> None:
    file, compress = tmp_path / "a.jsonl.zst", COMPRESS[".zst"]
    content = compress(json_lines(ROWS[:1]).encode()) + compress(json_lines(ROWS[1:]).encode())
    file.write_bytes(content)
    assert read(file)[0] == TEXTS
    file.write_bytes(content[:-5])
    with raises_data_error("cannot be read", path=file):
        read(file)


@pytest.mark.parametrize("name", ["a.parquet", "a", "a.txt"])
def test_parquet(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    rows = [{"text": text, "data": {"body": f"body {n}"}} for n, text in enumerate(TEXTS * 300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    assert read(file)[0] == TEXTS * 300
    assert read(file, json_field="data.body")[0] == [f"body {n}" for n in range(900)]
    with raises_data_error("no column 'body'", "text, data", path=file, key="body"):
        read(file, json_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_the_extra_its_name_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / name
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    if file.suffix == ".zst":
        file.write_bytes(COMPRESS[".zst"](json_lines().encode()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for errors in ("strict", "replace"):
        with raises_data_error("pip install 'moa-dist[formats]'", path=file):
            read(file, errors=errors)


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.tsv.gz", "\t")]
)
def test_columns(tmp_path: Path, name: str, delimiter: str) -> None:
    file = tmp_path / name
    compress = COMPRESS.get(file.suffix, bytes)
    file.write_bytes(compress(csv(delimiter).encode()))
    assert read(file)[0] == [TEXTS[0], "two"]
    assert read(file, json_field="id")[0] == ["1", "2"]
    with raises_data_error("no column 'body'", "id, text", "--json-field", path=file, key="body"):
        read(file, json_field="body")
    assert read(file, format="text")[0] == [csv(delimiter)]


def test_a_row_with_too_few_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id,text\n1,one\n2\n3,three\n")
    with raises_data_error("1 columns, but the first row has 2", path=file, line=3):
        read(file)
    documents, counts = read(file, bad_lines="skip")
    assert (documents, counts.bad_lines) == (["one", "three"], 1)
    file.write_text('id,text\n1,"one\n2,two\n')  # would swallow the rest of the file
    with raises_data_error("unexpected end of data", path=file):
        read(file)


FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "null": ('{"text": null}', ("field 'text' is null", "--bad-lines skip")),
    "missing": ('{"id": 1, "content": "x"}', ("no field 'text'", "(the line has: id, content)")),
    "a list": ('{"text": ["a"]}', ("an array", "--json-field")),
    "a number": ('{"text": 5}', ("a number", "--json-field")),
    "nested": ('{"text": {"body": "x"}}', ("it has: body", "--json-field text.body")),
    "not an object": ("[1]", ("not an object, but an array",)),
    "not JSON": ('{"text": "x', ("not JSON", "fix the line")),
    "two, one broken": ('{"text": "x"}{"text"', ("not JSON", "fix the line")),
    "a raw tab": ('{"text": "a\tb"}', ("not JSON", "Invalid control character")),
    "not UTF-8": ('{"text": "\udcff"}', ("not UTF-8",)),
    "half a surrogate pair": ('{"text": "\\ud800"}', ("not valid Unicode",)),
}


@pytest.mark.parametrize(("line", "says"), FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, name: str, line: str, says: tuple[str, ...]
) -> None:
    file = tmp_path / name
    content = json_lines(ROWS[:2]) + line + "\n" + json_lines(ROWS[2:])
    compress = COMPRESS.get(file.suffix, bytes)
    file.write_bytes(compress(content.encode(errors="surrogateescape")))
    with raises_data_error(*says, path=file, line=3):
        read(file)
    documents, counts = read(file, bad_lines="skip")
    assert (documents, counts.documents, counts.bad_lines) == (TEXTS, 3, 1)
    assert says[0] in counts.first_bad_line


def test_fields_inside_of_objects(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": {"b": {"c": "inner"}}}\n{"a.b": {"c": "x"}, "a": {"b": {"c": "y"}}}\n')
    assert read(file, json_field="a.b.c")[0] == ["inner", "y"]
    with raises_data_error("'b' has: c", path=file, line=1, key="a.b.d"):
        read(file, json_field="a.b.d")
    file.write_text('{"a.b": "a key with a dot"}\n')
    assert read(file, json_field="a.b")[0] == ["a key with a dot"]


def test_damaged_arrays_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS, indent=1)[:-2])
    with raises_data_error("the array has no end", path=file):
        read(file)
    file.write_text('[\n{"text": "one"},\n{"text": two}]')
    with raises_data_error("not JSON", path=file, line=3):
        read(file)


def test_an_object_without_the_field_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{\n  "name": "package",\n  "version": 1\n}\n')
    with raises_data_error("no field 'text'", "name, version", path=file, line=1):
        read(file)
    assert read(file, format="text")[0] == [file.read_text()]


def test_a_large_array_in_one_line_comes_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [{"text": f"{n} " + "words " * 3000} for n in range(300)]  # several MiB, no line end
    file.write_text(json.dumps(rows))
    assert read(file)[0] == [row["text"] for row in rows]


def test_json_on_stdin_and_from_a_shell_pipe(tmp_path: Path) -> None:
    stdin = io.BytesIO(json_lines().encode())
    (file,) = find_files(["-"], stdin, tmp_path / "stdin")
    assert read(file)[0] == read(file, json_field="text")[0] == TEXTS
    (file,) = find_files(["-"], io.BytesIO(gzip.compress(json_lines().encode())), file)
    assert read(file)[0] == TEXTS
    (file,) = find_files(["-"], io.BytesIO(csv(",").encode()), file)
    assert read(file, json_field="text")[0] == [TEXTS[0], "two"]
    (file,) = find_files(["-"], io.BytesIO(b"plain prose"), file)
    assert read(file)[0] == ["plain prose"]
    with raises_data_error("holds neither JSON nor a CSV column", key="--json-field"):
        read(file, json_field="text")

    source, sink = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(sink, "w").write(json_lines()))
    writer.start()
    (file,) = find_files([f"/dev/fd/{source}"], None, tmp_path / "stdin")
    writer.join()
    os.close(source)
    assert read(file)[0] == TEXTS


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.txt", "text")
    return out.getvalue()


OTHERS = {
    "a zip archive": archive(),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c",
    "a PDF": b"%PDF-1.7\n",
    "an Avro file": b"Obj\x01",
    "binary data": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["a", "a.txt", "a.txt.gz"])
def test_other_kinds_are_refused_by_name_even_if_errors_are_replaced(
    tmp_path: Path, kind: str, name: str
) -> None:
    file = tmp_path / name
    file.write_bytes(COMPRESS[".gz" if name.endswith(".gz") else ""](OTHERS[kind]))
    for errors in ("strict", "replace"):
        with raises_data_error(kind.removeprefix("a "), "convert", path=file) as caught:
            read(file, errors=errors)
        assert "--errors replace" not in str(caught.value)


def test_a_line_may_be_a_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n\n  two\nthree")
    documents, counts = read(file, documents="line")
    assert (documents, counts.empty) == (["one", "  two", "three"], 1)


def test_one_endless_line_is_the_same_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    text = "é🚢 word " * 400_000  # characters of 2 and 4 bytes, so that a MiB ends inside of some
    file.write_text(text)
    for rule in ("file", "blank-line", "line"):
        assert read(file, documents=rule)[0] == [text]


def test_a_folder_names_what_it_leaves_out_and_follows_links(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for name in ("a.txt", "._a.txt", ".hidden/b.txt", "c.bin", "d.zip", "e.7z.gz", "sub/f.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "part-00000").write_text("text without a suffix")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "prepared").mkdir()
    for name in ("manifest.json", "shard-000000.tar"):
        (folder / "prepared" / name).write_text("{}")
    elsewhere.mkdir()
    (elsewhere / "g.txt").write_text("x")
    (folder / "link").symlink_to(elsewhere)
    (folder / "link.txt").symlink_to(elsewhere / "g.txt")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    left_out, own = LeftOut(), folder / ".out.partial-1"
    own.mkdir()
    found = find_files([str(folder)], None, own / "stdin", left_out)
    names = [file.relative_to(folder).as_posix() for file in found]
    assert names == ["a.txt", "link/g.txt", "link.txt", "part-00000", "sub/f.md"]
    assert left_out.counts == {
        "hidden": 2,
        "of unknown kind": 2,
        "archives, to unpack first": 2,
        "folders of prepared shards": 1,
        "links to folders that are read anyway": 1,
        "broken links": 1,
    }
    for name in (".hidden", "._a.txt", "c.bin", "d.zip", "sub/loop", "broken.txt"):
        assert str(folder / name) in str(left_out)


def test_files_beyond_the_limit_are_named(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text("words " * 10)
    counts = TextCounts()
    for _ in read_documents(files, TextOptions(max_bytes=90), counts):
        pass
    assert counts.text_bytes == 90
    assert counts.left_out.names == {
        "not read to the end, as --max-bytes says": [str(files[1]), str(files[2])]
    }
