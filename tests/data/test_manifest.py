"""A manifest that is missing, damaged, foreign or malicious is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_dist.data.manifest import Manifest, load_manifest
from moa_dist.errors import DataError


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
    with pytest.raises(DataError, match=r"nowhere: no such folder; make it with moa-dist prepare"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"manifest\.json: missing.*run moa-dist prepare"):
        load_manifest(tmp_path)


def test_folder_of_a_split_points_to_its_part(
    make_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    make_shards(tmp_path / "train")
    with pytest.raises(DataError, match=rf"use {tmp_path / 'train'} instead"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"format_version": 1}'])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json: .*run moa-dist prepare again"):
        load_manifest(tmp_path)


def test_other_version(alter: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: format version 2.*prepare again"):
        load_manifest(alter(format_version=2))


@pytest.mark.parametrize(
    "name",
    ["../shard.tar", "a/b.tar", "a\\b.tar", "/etc/x.tar", "pipe:cat x.tar", "..tar", "x.tar\n"],
)
def test_names_cannot_leave_the_folder_or_run_anything(
    alter: Callable[..., Path], name: str
) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: invalid \(shards\.0\.file"):
        load_manifest(alter(shards=[{"file": name, "sha256": "0" * 64, "bytes": 1}]))


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
    with pytest.raises(DataError, match=r"manifest\.json: invalid"):
        load_manifest(alter(**fields))
