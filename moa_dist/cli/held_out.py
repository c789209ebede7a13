"""Held-out text for commands that let a trained model read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moa_dist.cli.progress import ProgressLine
from moa_dist.data.manifest import AnyManifest, PairManifest, load_manifest, load_pair_manifest
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import Trained

Item = TypeVar("Item")


def held_out_data(chosen: Path | None, trained: Trained) -> tuple[Path, AnyManifest]:
    """The folder of shards to read, by default the run's, and its manifest.

    Raises DataError if it is not there or does not fit the model.
    """
    data = trained.config.data
    if chosen is None and data.valid is None:
        raise DataError(
            f"{trained.folder}: the run has no validation data (data.valid); name a folder of "
            "shards with --data"
        )
    folder = Path(data.valid or "") if chosen is None else chosen
    if chosen is None and not folder.is_dir():
        raise DataError(
            f"{folder}: the run's validation data (data.valid) is not here; start from the folder "
            "that the run was started in, or name a folder of shards with --data"
        )
    pairs = trained.config.model.objective == "translation"
    manifest: AnyManifest = load_pair_manifest(folder) if pairs else load_manifest(folder)
    problems = []
    if manifest.tokenizer_sha256 != trained.tokenizer_sha256:
        problems.append(
            f"{folder}: prepared with another tokenizer than the run's; prepare it again with "
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
    return folder, manifest


def num_sequences(manifest: AnyManifest, wanted: int | None) -> int:
    """Samples or pairs to read: the wanted ones, but no more than there are; None means all."""
    held_out = manifest.pairs if isinstance(manifest, PairManifest) else manifest.num_samples
    return min(wanted or held_out, held_out)


def with_progress(
    doing: str,
    batches: Iterator[Item],
    total: int,
    size: Callable[[Item], int],
    world_size: int = 1,
) -> Iterator[Item]:
    """The batches of rank 0, of `total` sequences on all ranks; the others are about as far.

    `size` tells the sequences of a batch.
    """
    progress, done = ProgressLine(), 0
    progress(doing, done, total)
    for batch in batches:
        yield batch
        done = min(done + size(batch) * world_size, total)
        progress(doing, done, total)
