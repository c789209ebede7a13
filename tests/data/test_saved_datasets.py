"""Arrow files, and data sets as Hugging Face's library saves them, are read row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc

from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.raises import raises_data_error

TEXTS = [f"text {n}, é\n" for n in range(1000)]


def write_arrow(file: Path, texts: list[str], *, stream: bool = True, per_batch: int = 300) -> None:
    rows = [{"text": text, "meta": {"body": f"body of {text}"}} for text in texts]
    table = pyarrow.Table.from_pylist(rows)
    new = ipc.new_stream if stream else ipc.new_file
    with new(file, table.schema) as out:
        out.write_table(table, max_chunksize=per_batch)


def save_to_disk(folder: Path, texts: list[str]) -> None:
    """Write what `datasets.Dataset.save_to_disk` does, in two shards."""
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for n, name in enumerate(names):
        half = len(texts) // 2
        write_arrow(folder / name, texts[n * half : (n + 1) * half])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "5fd4"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"description": "text"}))
    write_arrow(folder / "cache-1234.arrow", ["of an earlier map"])


def read(*inputs: Path, **options: Any) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    files = find_files([str(path) for path in inputs], None, Path("stdin"), counts.left_out)
    documents = read_documents(files, TextOptions(**options), counts)
    return ["".join(pieces) for pieces in documents], counts


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ["a.arrow", "a", "a.txt"])
def test_arrow_is_recognized_by_content(tmp_path: Path, name: str, stream: bool) -> None:
    file = tmp_path / name
    write_arrow(file, TEXTS, stream=stream)
    assert read(file)[0] == TEXTS
    assert read(file, json_field="meta.body")[0] == [f"body of {text}" for text in TEXTS]
    with raises_data_error("no column 'body'", "text, meta", path=file, key="body"):
        read(file, json_field="body")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with raises_data_error("cannot be read", path=file):
        read(file)


def test_a_saved_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    save_to_disk(folder, TEXTS)
    documents, counts = read(folder)
    assert documents == TEXTS
    assert counts.left_out.counts == {"descriptions of data sets": 2, "not of a data set": 1}
    assert counts.left_out.names["not of a data set"] == [str(folder / "cache-1234.arrow")]


def test_a_saved_data_set_is_found_within_a_folder(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "corpus/one", TEXTS[:10])
    (tmp_path / "corpus/two.txt").write_text("two")
    assert read(tmp_path / "corpus")[0] == [*TEXTS[:10], "two"]


def test_several_splits_are_refused_and_one_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "both" / split, [split] * 4)
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with raises_data_error("train, test", str(tmp_path / "both/train"), path=tmp_path / "both"):
        read(tmp_path / "both")
    assert read(tmp_path / "both/train")[0] == ["train"] * 4
    save_to_disk(tmp_path / "one/train", ["train"] * 4)
    (tmp_path / "one/dataset_dict.json").write_text('{"splits": ["train"]}')
    documents, counts = read(tmp_path / "one")
    assert documents == ["train"] * 4
    assert counts.left_out.counts["descriptions of data sets"] == 3


STATES = {
    "no JSON": "{",
    "no list": '{"_data_files": 5}',
    "an array": "[]",
    "a file that is missing": '{"_data_files": [{"filename": "data-9.arrow"}]}',
    "a file elsewhere": '{"_data_files": [{"filename": "../text.arrow"}]}',
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_damaged_description_is_named(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "corpus"
    save_to_disk(folder, TEXTS[:4])
    write_arrow(tmp_path / "text.arrow", ["elsewhere"])
    (folder / "state.json").write_text(state)
    with raises_data_error("damaged", path=folder / "state.json"):
        read(folder)


def test_rows_that_were_selected_but_not_written_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    save_to_disk(folder, TEXTS[:4])
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with raises_data_error("flatten_indices", path=folder):
        read(folder)


def test_what_the_library_itself_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "a"), num_shards=3)
    left_out = LeftOut()
    files = find_files([str(tmp_path / "a")], None, tmp_path / "stdin", left_out)
    assert len(files) == 3
    assert read(tmp_path / "a")[0] == TEXTS
