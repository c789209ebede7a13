"""Documents come out as they were written, and every problem names its file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from moa_dist.data.input_files import find_files
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.raises import raises_data_error


def read(*files: Path, options: TextOptions | None = None) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    documents = read_documents(files, options or TextOptions(), counts)
    return ["".join(pieces) for pieces in documents], counts


def test_a_file_is_a_document_unless_blank_lines_end_them(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n \t\n\n\nthree\n")
    assert read(file)[0] == ["one\r\ntwo\n \t\n\n\nthree\n"]
    assert read(file, options=TextOptions("blank-line"))[0] == ["one\r\ntwo", "three"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_files_and_cut_off_ones(tmp_path: Path, suffix: str, compress: object) -> None:
    assert callable(compress)
    text = "Grüße, 世界\n" * 1000
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compress(text.encode()))
    documents, counts = read(file)
    assert documents == [text]
    assert (counts.text_bytes, counts.input_bytes) == (len(text.encode()), file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-12])
    with raises_data_error(path=file):
        read(file)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": "one\n\nstill one"}, {"text": "  "}, {"text": "two", "url": "x"}]
    file.write_text("\n".join(json.dumps(record) for record in records))
    documents, counts = read(file, options=TextOptions("blank-line"))
    assert documents == ["one\n\nstill one", "two"]
    assert (counts.documents, counts.empty, counts.text_bytes) == (2, 1, 17)
    with raises_data_error("text", "--json-field", path=file, line=1, key="url"):
        read(file, options=TextOptions(json_field="url"))
    file.write_text('{"text": "one"}\n{"text": "tw')
    with raises_data_error(path=file, line=2, key=None):
        read(file)


def test_text_that_is_not_utf8_is_an_error_with_its_place_or_replaced(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("fine é\n".encode() + b"caf\xe9 au lait\nok\n")
    with raises_data_error("byte 11", "--errors replace", path=file, line=2):
        read(file)
    documents, counts = read(file, options=TextOptions(errors="replace"))
    assert documents == ["fine é\ncaf\ufffd au lait\nok\n"]
    assert counts.replaced == 1


def test_half_a_surrogate_pair_in_json(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\ud83dz"}')
    with raises_data_error("character 1", path=file, line=1, key="text"):
        read(file)
    assert read(file, options=TextOptions(errors="replace"))[0] == ["a?z"]


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ["b/z.md", "b/a.py", "a.txt.gz", "c.bin", "b/d.jsonl"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path)], io.BytesIO(), tmp_path / "spool")
    assert [f.relative_to(tmp_path).as_posix() for f in found] == [
        "a.txt.gz",
        "b/a.py",
        "b/d.jsonl",
        "b/z.md",
    ]


def test_stdin_can_be_read_twice(tmp_path: Path) -> None:
    files = find_files(["-"], io.BytesIO(b"one\n\ntwo"), tmp_path / "spool")
    options = TextOptions("blank-line")
    assert read(*files, options=options)[0] == read(*files, options=options)[0] == ["one", "two"]


def test_missing_and_empty_inputs_say_what_to_do(tmp_path: Path) -> None:
    with raises_data_error("--input", path=tmp_path / "nowhere"):
        find_files([str(tmp_path / "nowhere")], io.BytesIO(), tmp_path / "spool")
    with raises_data_error(path=tmp_path):
        find_files([str(tmp_path)], io.BytesIO(), tmp_path / "spool")
    (tmp_path / "a.txt").write_text(" \n\n")
    with raises_data_error("1 files", "1 empty documents", key="--input"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("limit", range(4, 14))
def test_limit_cuts_the_last_document_between_characters(tmp_path: Path, limit: int) -> None:
    file = tmp_path / "a.txt"
    file.write_text("aéb\n\n🚢c\n\nend", encoding="utf-8")
    documents, counts = read(file, options=TextOptions("blank-line", max_bytes=limit))
    whole = "aéb🚢cend"
    assert whole.startswith("".join(documents))
    assert counts.text_bytes == len("".join(documents).encode())
    assert min(limit, len(whole.encode())) - 4 < counts.text_bytes <= limit


def test_white_space_without_end_takes_no_memory(tmp_path: Path) -> None:
    file, space = tmp_path / "a.txt", (" " * 99 + "\n") * 100_000
    file.write_text(space)
    tracemalloc.start()
    try:
        counts = TextCounts()
        with raises_data_error("1 empty documents", key="--input"):
            list(read_documents([file], TextOptions(), counts))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(space) / 4
    file.write_text(space + "text")
    assert read(file)[0] == [space + "text"]
