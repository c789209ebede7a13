"""The folders of prepared data that a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moa_dist.data.manifest import AnyManifest


class DataFolder(NamedTuple):
    """A folder of shards under the name that the run knows it by."""

    name: str
    """Name of the source, or of the validation data."""
    path: Path
    """The folder."""
    manifest: AnyManifest
    """Its manifest."""
    task: int | None = None
    """Task of its sequences, for routers that have one per task."""


class RunData(NamedTuple):
    """All data of a run."""

    train: tuple[DataFolder, ...]
    """What it trains on, at least one; several are mixed."""
    valid: tuple[DataFolder, ...]
    """What it validates on, if anything."""
