"""Text that a run names directly is prepared once, by whoever comes first, as `prepare` does it."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moa_dist.config.data import DataConfig
from moa_dist.data import direct_text, places
from moa_dist.data.check import check_data
from moa_dist.data.direct_text import is_text
from moa_dist.data.manifest import load_manifest
from moa_dist.data.places import is_unprepared, local_path, prepare_texts
from moa_dist.data.prepare import prepare
from moa_dist.data.text_options import TextOptions
from moa_dist.errors import DataError, StoppedError
from tests.data.servers import FaultyServer
from tests.data.test_saved_datasets import save_to_disk
from tests.raises import raises_data_error
from tests.small_shards import write_folder

TEXTS = [f"Document {n} is about {n * n} things, and about a café in 日本." for n in range(60)]
LENGTH, VOCABULARY = 8, 300


@pytest.fixture(autouse=True)
def new_process() -> None:
    """Forget what this process knows of texts."""
    direct_text._files.cache_clear()
    places._configured_tokenizer.cache_clear()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n, name in enumerate(("a", "b")):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[n::2])
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return folder


def config(tmp_path: Path, train: object, **fields: object) -> DataConfig:
    options = {"vocab_size": VOCABULARY, "folder": str(tmp_path / "shards")}
    options |= fields.pop("prepare", {})  # type: ignore[arg-type]
    return DataConfig(
        train=train,
        sequence_length=LENGTH,
        cache={"folder": str(tmp_path / "cache")},
        prepare=options,
        **fields,
    )


def prepare_all(data: DataConfig, should_stop: Callable[[], bool] = direct_text.never) -> Path:
    prepare_texts(data, (*data.sources, *data.held_out), should_stop)
    return local_path(data, data.sources[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def prepared(source: Path, output: Path, **options: object) -> dict[str, bytes]:
    """What the command makes of a text."""
    sizes = {"block_length": LENGTH, "vocab_size": VOCABULARY}
    prepare([str(source)], output, **sizes | options)  # type: ignore[arg-type]
    return contents(output)


def test_it_is_what_prepare_makes(corpus: Path, tmp_path: Path) -> None:
    data = config(tmp_path, str(corpus))
    assert is_unprepared(data, data.sources[0])
    place = prepare_all(data)
    assert not is_unprepared(data, data.sources[0])
    assert place.parent == tmp_path / "shards"
    assert contents(place) == prepared(corpus, tmp_path / "out")
    (found,), _ = check_data(data, vocab_size=VOCABULARY, world_size=1)
    assert (found.path, found.manifest) == (place, load_manifest(place))


def test_a_second_start_makes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(tmp_path, str(corpus))
    place = prepare_all(data)
    monkeypatch.setattr("moa_dist.data.prepare.prepare", None)
    direct_text._files.cache_clear()
    assert prepare_all(data) == place


def test_changed_text_and_other_options_go_elsewhere(corpus: Path, tmp_path: Path) -> None:
    data = config(tmp_path, str(corpus))
    found = [prepare_all(data)]
    for change in (
        {"sequence_length": 16},
        {"prepare": data.prepare.changed(vocab_size=310)},
        {"prepare": data.prepare.changed(bad_lines="skip")},
        {"prepare": data.prepare.changed(tokenizer=str(found[0]))},
    ):
        found.append(prepare_all(data.changed(**change)))
    (corpus / "c.txt").write_text("more text")
    direct_text._files.cache_clear()
    found.append(prepare_all(data))
    os.utime(corpus / "c.txt", (1, 1))
    direct_text._files.cache_clear()
    found.append(prepare_all(data))
    assert len(set(found)) == len(found)
    os.utime(corpus / "c.txt", (2, 2))
    assert prepare_all(data) == found[-1]  # a process knows one state of its text


def test_options_of_the_configuration(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"doc": {"body": t}}) for t in TEXTS]
    text.write_text("\n".join([*rows, '{"doc": null}']))
    options = {"json_field": "doc.body", "bad_lines": "skip"}
    place = prepare_all(config(tmp_path, str(text), prepare=options))
    expected = prepared(text, tmp_path / "out", text=TextOptions(**options))  # type: ignore[arg-type]
    assert contents(place) == expected


def test_sources_and_validation_share_the_tokenizer_of_the_first(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[:20]))
    train = [{"path": str(corpus), "weight": 1}, {"path": str(tmp_path / "b.txt"), "weight": 1}]
    data = config(tmp_path, train, valid=str(tmp_path / "b.txt"))
    first = prepare_all(data)
    train_folders, valid = check_data(data, vocab_size=VOCABULARY, world_size=1)
    manifests = [folder.manifest for folder in (*train_folders, *valid)]
    assert len(manifests) == 3
    assert len({manifest.tokenizer_sha256 for manifest in manifests}) == 1
    assert contents(valid[0].path) == prepared(tmp_path / "b.txt", tmp_path / "o", tokenizer=first)


def test_text_gets_the_tokenizer_of_a_folder_that_was_prepared(
    corpus: Path, tmp_path: Path
) -> None:
    made = prepared(corpus, tmp_path / "made")
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[:20]))
    train = [
        {"path": str(tmp_path / "b.txt"), "weight": 1, "name": "text"},
        {"path": str(tmp_path / "made"), "weight": 1},
    ]
    data = config(tmp_path, train)
    place = prepare_all(data)
    assert contents(place)["tokenizer.json"] == made["tokenizer.json"]
    check_data(data, vocab_size=VOCABULARY, world_size=1)


@pytest.mark.parametrize("kind", ["a file", "a range", "a saved data set", "a tar"])
def test_kinds_of_text(corpus: Path, tmp_path: Path, kind: str) -> None:
    from tests.data.test_archives import tar

    save_to_disk(tmp_path / "saved", TEXTS)
    (tmp_path / "a.tar").write_bytes(tar((f"{n}.txt", t.encode()) for n, t in enumerate(TEXTS)))
    path = {
        "a file": f"{corpus}/a.jsonl.gz",
        "a range": f"{corpus}/{{a,b}}.jsonl.gz",
        "a saved data set": str(tmp_path / "saved"),
        "a tar": str(tmp_path / "a.tar"),
    }[kind]
    place = prepare_all(config(tmp_path, path))
    assert contents(place) == prepared(Path(path), tmp_path / "out")
    if kind == "a range":
        assert place.name.startswith("train-")
        assert config(tmp_path, [{"path": path, "weight": 1}]).sources[0].label == "corpus"


def test_what_is_no_text(tmp_path: Path) -> None:
    write_folder(tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "shards").rename(tmp_path / "both/train")
    assert not is_text(str(tmp_path / "both"))
    assert not is_text(str(tmp_path / "both/train"))
    (tmp_path / "both/train/manifest.json").unlink()
    for name in ("both/train", "empty", "nothing"):
        assert not is_text(str(tmp_path / name))
    for url in ("s3://bucket/books/train", "https://host/books", "hf://datasets/me/text"):
        assert not is_text(url)
    for url in ("s3://bucket/a.tar", "https://host/{00..99}.jsonl", "hf://datasets/me/t.parquet"):
        assert is_text(url)


def test_checks_before_anything_is_prepared(corpus: Path, tmp_path: Path) -> None:
    prepared(corpus, tmp_path / "made")
    prepared(corpus, tmp_path / "other", vocab_size=290)
    data = config(tmp_path, str(corpus))
    check = {"world_size": 1, "may_lack_text": True}
    assert check_data(data, vocab_size=VOCABULARY, **check) == ((), ())

    def problem(data: DataConfig, *, vocab_size: int = VOCABULARY, **changes: object) -> DataError:
        with pytest.raises(DataError) as caught:
            check_data(data, vocab_size=vocab_size, **check | changes)
        (cause,) = caught.value.causes
        return cause

    assert "text whose shards are missing" in str(problem(data, may_lack_text=False))
    for found in (problem(data, vocab_size=VOCABULARY - 1), problem(data, objective="masked")):
        assert (found.path, found.key) == (corpus, "model.vocab_size")
    assert "--pairs" in str(problem(data, objective="translation"))
    named = data.prepare.changed(tokenizer=str(tmp_path / "other"))
    found = problem(data.changed(prepare=named, valid=str(tmp_path / "made")))
    assert (found.path, found.key) == (tmp_path / "made", "tokenizer_sha256")
    half = f"{corpus}/{{a,b,c}}.jsonl.gz"
    found = problem(config(tmp_path, half))
    assert found.key == half
    assert f"{corpus}/c.jsonl.gz" in str(found)
    gone = data.prepare.changed(tokenizer=str(tmp_path / "gone.json"))
    assert problem(data.changed(prepare=gone)).path == tmp_path / "gone.json"
    assert not (tmp_path / "shards").exists()


def test_many_at_once_prepare_it_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, made = config(tmp_path, str(corpus)), []

    def counted(*args: object, **options: object) -> object:
        made.append(1)
        time.sleep(0.3)
        return prepare(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("moa_dist.data.prepare.prepare", counted)
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(prepare_all, [data] * 6))
    assert len(found) == len(made) == 1
    assert len(load_manifest(found.pop()).shards) >= 1


@pytest.fixture
def held(corpus: Path, tmp_path: Path) -> Iterator[tuple[DataConfig, Path]]:
    """A text that another process seems to prepare, and its place."""
    data = config(tmp_path, str(corpus))
    place = local_path(data, data.sources[0])
    place.parent.mkdir()
    with place.with_name(f".{place.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield data, place


def test_waiting_ends_if_the_other_makes_no_progress(
    held: tuple[DataConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_text, "_STALLED_S", 0.5)
    data, place = held
    place.with_name(f".{place.name}.progress").write_text("tokenizing: 45.0 %")
    with raises_data_error("tokenizing: 45.0 %", path=place):
        prepare_all(data)


def test_waiting_goes_on_while_the_other_makes_progress(
    held: tuple[DataConfig, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(direct_text, "_STALLED_S", 2.0)
    monkeypatch.setattr(direct_text, "_REPORT_S", 0.5)
    data, place = held
    steps = iter(range(1000))
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(0.3):
            place.with_name(f".{place.name}.progress").write_text(f"tokenizing: {next(steps)} %")

    worker = threading.Thread(target=go_on)
    worker.start()
    begun = time.monotonic()
    with pytest.raises(StoppedError):
        prepare_all(data, lambda: time.monotonic() - begun > 4.0)
    stop.set()
    worker.join()
    assert "waiting for another process" in capsys.readouterr().err


def test_a_request_to_stop_ends_the_preparation(corpus: Path, tmp_path: Path) -> None:
    data = config(tmp_path, str(corpus))
    with pytest.raises(StoppedError):
        prepare_all(data, lambda: True)
    assert contents(prepare_all(data)) == prepared(corpus, tmp_path / "out")


SCRIPT = """
import sys
from moa_dist.config.data import DataConfig
from moa_dist.data.places import prepare_texts
data = DataConfig.model_validate_json(sys.argv[1])
prepare_texts(data, data.sources)
"""


@pytest.mark.full
def test_whoever_is_killed_is_followed_by_the_next(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    with text.open("w") as file:
        for n in range(3_000):
            file.write(json.dumps({"text": f"{TEXTS[n % 60]} " * (n % 7)}) + "\n")
    data = config(tmp_path, str(text))
    place = local_path(data, data.sources[0])
    command = [sys.executable, "-c", SCRIPT, data.model_dump_json()]
    for moment in (0.0, 0.3, 0.8):
        first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not place.with_name(f".{place.name}.lock").exists() and first.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        second = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        first.send_signal(signal.SIGKILL)
        first.wait()
        if moment < 0.8:
            second.send_signal(signal.SIGKILL)
        assert second.wait(120) in (0, -signal.SIGKILL)
    assert contents(prepare_all(data)) == prepared(text, tmp_path / "out")


def test_text_that_changes_meanwhile_is_not_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*args: object, **options: object) -> object:
        (corpus / "c.txt").write_text("more")
        return prepare(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("moa_dist.data.prepare.prepare", changing)
    data = config(tmp_path, str(corpus))
    with raises_data_error("changed while", path=corpus):
        prepare_all(data)
    assert is_unprepared(data, data.sources[0])


def test_text_behind_a_url(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer(corpus).serving() as server:
        data = config(tmp_path, f"{server.url}/{{a,b}}.jsonl.gz")
        assert contents(prepare_all(data)) == prepared(corpus, tmp_path / "out")
        before = server.requests.total()
        prepare_all(data)
        assert server.requests.total() == before
        missing = config(tmp_path, f"{server.url}/{{a,b,c}}.jsonl.gz")
        with raises_data_error("1 of 3 files are missing", f"{server.url}/c.jsonl.gz"):
            prepare_all(missing)


def test_a_place_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file")
    with raises_data_error("data.prepare.folder", key="data.prepare.folder"):
        prepare_all(config(tmp_path, str(corpus)))


def test_the_cache_of_shards_never_removes_it(corpus: Path, tmp_path: Path) -> None:
    from moa_dist.data.cache import _make_room

    data = config(tmp_path, str(corpus), prepare={"folder": None})
    place = prepare_all(data)
    assert place.parent == tmp_path / "cache/text"
    assert _make_room(tmp_path / "cache", 10, 20)
    assert len(contents(place)) >= 3
