"""A manifest that is missing, damaged, foreign or malicious is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_dist.data.manifest import Manifest, load_manifest
from moa_dist.errors import DataError
from tests.raises import raises_data_error


@pytest.fixture
def alter(make_shards: Callable[..., Manifest], tmp_path: Path) -> Callable[..., Path]:
    def change(**fields: Any) -> Path:
        make_shards(tmp_path)
        file = tmp_path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return tmp_path

    return change


def test_round_trip(make_shards: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert manifest.num_samples == 48


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with raises_data_error("moa-dist prepare", path=tmp_path / "nowhere"):
        load_manifest(tmp_path / "nowhere")
    with raises_data_error("moa-dist prepare", path=tmp_path / "manifest.json"):
        load_manifest(tmp_path)


def test_folder_of_a_split_points_to_its_part(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_shards(tmp_path / "train")
    with raises_data_error(tmp_path / "train", path=tmp_path / "manifest.json"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"format_version": 1}'])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with raises_data_error("moa-dist prepare", path=tmp_path / "manifest.json"):
        load_manifest(tmp_path)


def test_other_version(alter: Callable[..., Path]) -> None:
    folder = alter(format_version=2)
    with raises_data_error(2, path=folder / "manifest.json", key="format_version"):
        load_manifest(folder)


@pytest.mark.parametrize(
    "name",
    ["../shard.tar", "a/b.tar", "a\\b.tar", "/etc/x.tar", "pipe:cat x.tar", "..tar", "x.tar\n"],
)
def test_names_cannot_leave_the_folder_or_run_anything(
    alter: Callable[..., Path], name: str
) -> None:
    folder = alter(shards=[{"file": name, "sha256": "0" * 64, "bytes": 1}])
    with raises_data_error(path=folder / "manifest.json", key="shards.0.file"):
        load_manifest(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"surprise": 1},
        {"samples_per_shard": 0},
        {"samples_per_shard": "6"},
        {"shards": []},
        {"end_of_document": 48},
        {"vocab_size": 70000},
        {"dtype": "int64"},
        {"shards": [{"file": "a.tar", "sha256": "0" * 64, "bytes": 1}] * 2},
    ],
)
def test_impossible_contents(alter: Callable[..., Path], fields: dict[str, Any]) -> None:
    folder = alter(**fields)
    with pytest.raises(DataError) as caught:
        load_manifest(folder)
    assert caught.value.path == folder / "manifest.json"
    assert caught.value.key in {*fields, "manifest"}, "several fields contradict each other"
