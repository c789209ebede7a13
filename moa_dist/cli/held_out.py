"""Held-out data for commands that run a trained model on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moa_dist.cli.arguments import add_task, between
from moa_dist.cli.progress import ProgressLine
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import AnyManifest, PairManifest, load_any_manifest
from moa_dist.data.places import mirror, prepare_texts
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import Trained, require_task

Item = TypeVar("Item")


def add_held_out_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which held-out data to read, how much of it, and how much at once."""
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="shards to read (the run's data.valid)"
    )
    add_task(parser, "task of --data, if the model has a router per task")
    parser.add_argument(
        "--sequences", type=between(int, 1), metavar="N", help="read only the first N (all)"
    )
    parser.add_argument(
        "--micro-batch", type=between(int, 1), default=8, metavar="B", help="sequences at once (8)"
    )


def held_out_folder(chosen: Path | None, trained: Trained, task: int | None) -> DataFolder:
    """Return the folder of shards to read, by default the run's only one.

    Raises DataError if it does not exist or does not match the model.
    """
    paths = [folder.path for folder in trained.config.data.held_out]
    if chosen is None and len(paths) > 1:
        raise DataError(
            f"{trained.folder}: the run has {len(paths)} folders of validation data (data.valid); "
            f"choose one with --data: {', '.join(paths)}"
        )
    (folder,) = held_out_folders(chosen, trained, task)
    return folder


def held_out_folders(chosen: Path | None, trained: Trained, task: int | None) -> list[DataFolder]:
    """Return the folder of shards to read, by default all of the run's; `task` is that of `chosen`.

    Raises DataError if one does not exist or does not match the model.
    """
    data = trained.config.data
    if chosen is not None:
        require_task(trained, task)
        return [DataFolder(str(chosen), chosen, _manifest(chosen, trained), task)]
    if task is not None:
        raise DataError(
            "--task is the task of a folder given by --data; the run's own folders have their "
            "`task` in `data.valid`; leave out --task, or name a folder",
            key="task",
        )
    if not data.held_out:
        raise DataError(
            f"{trained.folder}: the run has no validation data (data.valid); pass a folder of "
            "shards with --data"
        )
    found = []
    prepare_texts(data, data.held_out)
    for each in data.held_out:
        folder = mirror(data, each)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: the run's validation data (data.valid) was not found; start in the "
                "folder where the run was started, or pass a folder of shards with --data"
            )
        found.append(DataFolder(each.label, folder, _manifest(folder, trained), each.task))
    return found


def _manifest(folder: Path, trained: Trained) -> AnyManifest:
    """Return the manifest of a folder that matches the model. Raises DataError."""
    data = trained.config.data
    manifest = load_any_manifest(folder, trained.config.model.objective)
    problems = []
    if manifest.tokenizer_sha256 != trained.tokenizer_sha256:
        problems.append(
            f"{folder}: prepared with a different tokenizer than the run's; prepare it again with "
            f"--tokenizer {trained.tokenizer_file.parent}"
        )
    if manifest.block_length != data.sequence_length:
        problems.append(
            f"{folder}: prepared for sequences of {manifest.block_length} tokens, but the model "
            f"was trained on {data.sequence_length}; prepare it again with --sequence-length "
            f"{data.sequence_length}"
        )
    if problems:
        raise DataError("\n".join(problems))
    return manifest


def num_sequences(manifest: AnyManifest, wanted: int | None) -> int:
    """Return how many samples or pairs to read: `wanted`, or all if fewer exist or it is None."""
    held_out = manifest.pairs if isinstance(manifest, PairManifest) else manifest.num_samples
    return min(wanted or held_out, held_out)


def with_progress(
    doing: str,
    batches: Iterator[Item],
    total: int,
    size: Callable[[Item], int],
    world_size: int = 1,
) -> Iterator[Item]:
    """Yield the batches of rank 0 and print progress, as if all ranks were equally far.

    `total` counts the sequences of all ranks, `size` those of one batch.
    """
    progress, done = ProgressLine(), 0
    progress(doing, done, total)
    for batch in batches:
        yield batch
        done = min(done + size(batch) * world_size, total)
        progress(doing, done, total)
