"""Whatever is in a file, the product takes it or says what is wrong; it never breaks."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moa_dist.analyze.results import ANALYSIS_FILE, load_analysis
from moa_dist.analyze.summary import summary
from moa_dist.config import load_config, to_yaml
from moa_dist.data.manifest import Manifest, load_manifest, sha256_of
from moa_dist.data.shards import read_shard
from moa_dist.data.text import read_documents
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.data.tokenizer import load_tokenizer, train_tokenizer
from moa_dist.errors import MoaDistError
from moa_dist.report.analysis import analysis_page
from tests.analyze.test_panels import ROUTER, analysis
from tests.bad_input.case import time_limit
from tests.config.conftest import BASE
from tests.small_shards import write_folder

bounded = settings(max_examples=150, deadline=None, derandomize=True)
TOKENIZER = train_tokenizer(["some text"], 257).to_json()

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["dense", "moa", "switchhead", "moe", "adamw", 10**400, -1, 0, 2**63]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from _leaves(value, (*path, key))


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], value)
    return copy


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, time_limit():
        yield Path(name)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bytes replaced, inserted, cut out, or its end missing."""
    damaged = content
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(damaged)))
        stop = draw(st.integers(start, min(start + 9, len(damaged))) | st.just(len(damaged)))
        damaged = damaged[:start] + draw(st.binary(max_size=9)) + damaged[stop:]
    return damaged


def _config_tree() -> Any:
    with folder() as here:
        (here / "base.yaml").write_text(BASE)
        return json.loads(load_config(here / "base.yaml").model_dump_json())


def _manifest_tree() -> Any:
    with folder() as here:
        return json.loads(write_folder(here, num_shards=2).model_dump_json())


CONFIG_TREE, MANIFEST_TREE = _config_tree(), _manifest_tree()
ANALYSIS_TREE = json.loads(analysis(ROUTER).model_dump_json())


@settings(bounded, max_examples=60)
@given(st.sampled_from(list(_leaves(CONFIG_TREE))), values)
def test_a_configuration_with_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    with folder() as here:
        (here / "run.yaml").write_text(json.dumps(_replaced(CONFIG_TREE, path, value)))
        with contextlib.suppress(MoaDistError):
            config = load_config(here / "run.yaml")
            (here / "again.yaml").write_text(to_yaml(config))
            assert load_config(here / "again.yaml") == config


@bounded
@given(damaged_bytes(BASE.encode()))
def test_a_configuration_of_any_bytes(content: bytes) -> None:
    with folder() as here:
        (here / "run.yaml").write_bytes(content)
        with contextlib.suppress(MoaDistError):
            load_config(here / "run.yaml")


@bounded
@given(st.text(), values)
@example("train.steps", 10**400)
def test_any_override(key: str, value: Any) -> None:
    with folder() as here:
        (here / "run.yaml").write_text(BASE)
        with contextlib.suppress(MoaDistError):
            load_config(here / "run.yaml", [f"{key}={json.dumps(value)}", key])


@bounded
@given(st.sampled_from(list(_leaves(MANIFEST_TREE))), values)
@example(("shards", 0, "file"), "../shard-000000.tar")
def test_a_manifest_with_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    with folder() as here:
        write_folder(here, num_shards=2)
        (here / "manifest.json").write_text(json.dumps(_replaced(MANIFEST_TREE, path, value)))
        with contextlib.suppress(MoaDistError):
            manifest = load_manifest(here)
            assert manifest.bytes_per_token > 0
            for index in range(len(manifest.shards)):
                _sound(here, manifest, index)


@bounded
@given(damaged_bytes(json.dumps(MANIFEST_TREE).encode()))
def test_a_manifest_of_any_bytes(content: bytes) -> None:
    with folder() as here:
        (here / "manifest.json").write_bytes(content)
        with contextlib.suppress(MoaDistError):
            load_manifest(here)


@bounded
@given(st.sampled_from(list(_leaves(ANALYSIS_TREE))), values)
@example(("routers", 0, "load", 0, 0), 2**53)
@example(("routers", 0, "num_tokens"), 0)
@example(("routers", 0, "load"), [[0] * 4] * 2)
def test_an_analysis_with_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    with folder() as here:
        (here / ANALYSIS_FILE).write_text(json.dumps(_replaced(ANALYSIS_TREE, path, value)))
        with contextlib.suppress(MoaDistError):
            found = load_analysis(here)
            assert found is not None
            assert "</html>" in analysis_page(found)
            assert summary(found)


def _sound(here: Path, manifest: Manifest, index: int) -> None:
    """A shard that is read holds what the manifest promises."""
    samples = read_shard(here, manifest, index)
    assert samples.shape == (manifest.samples_per_shard, manifest.block_length + 1)
    assert samples.max() < manifest.vocab_size


@bounded
@given(st.data())
def test_a_shard_of_any_bytes_is_refused_or_sound(data: st.DataObject) -> None:
    """First as damage, then as a forgery with a checksum that agrees."""
    with folder() as here:
        manifest = write_folder(here, num_shards=2)
        file = here / manifest.shards[1].file
        whole = file.read_bytes()
        content = data.draw(damaged_bytes(whole))
        file.write_bytes(content)
        if content != whole:
            with contextlib.suppress(MoaDistError):
                _sound(here, manifest, 1)
                raise AssertionError("damage was not seen")
        entry = {"sha256": sha256_of(content), "bytes": max(len(content), 1)}
        forged = manifest.shards[1].model_copy(update=entry)
        manifest = manifest.model_copy(update={"shards": (manifest.shards[0], forged)})
        with contextlib.suppress(MoaDistError):
            _sound(here, manifest, 1)
        assert sorted(os.listdir(here)) == [
            "manifest.json", *(shard.file for shard in manifest.shards), "tokenizer.json"
        ]  # fmt: skip


@bounded
@given(
    st.binary(max_size=60) | st.text(max_size=30).map(str.encode),
    st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.xz", ".bz2"]),
    st.sampled_from(["strict", "replace"]),
    st.sampled_from(["file", "blank-line"]),
)
@example(b'{"text": ' + b"9" * 5000 + b"}", ".jsonl", "strict", "file")
@example("text".encode("utf-16-le"), ".txt", "replace", "file")
def test_text_of_any_bytes(content: bytes, suffix: str, errors: Any, documents: Any) -> None:
    with folder() as here:
        file = here / f"a{suffix}"
        file.write_bytes(content)
        counts = TextCounts()
        with contextlib.suppress(MoaDistError):
            options = TextOptions(documents, errors=errors)
            num_bytes = 0
            for pieces in read_documents([file], options, counts):
                text = "".join(pieces)
                num_bytes += len(text.encode())
                assert text.strip()
                assert num_bytes == counts.text_bytes
                assert "\0" not in text or suffix == ".jsonl"


@settings(bounded, max_examples=60)
@given(damaged_bytes(TOKENIZER.encode()), st.text(max_size=20))
def test_a_tokenizer_of_any_bytes(content: bytes, text: str) -> None:
    with folder() as here:
        (here / "tokenizer.json").write_bytes(content)
        with contextlib.suppress(MoaDistError):
            tokenizer = load_tokenizer(here)
            ids = np.asarray(tokenizer.encode(text), np.int64)
            assert (ids < tokenizer.vocab_size).all()
