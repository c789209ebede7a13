"""`moa-dist eval`: perplexity on held-out text. Arguments and printing only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_dist.cli.arguments import between
from moa_dist.cli.progress import ProgressLine
from moa_dist.data.manifest import Manifest, load_manifest
from moa_dist.data.validation import validation_batches
from moa_dist.errors import DataError
from moa_dist.evaluate.perplexity import perplexity
from moa_dist.evaluate.trained import Trained, load_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, of one checkpoint, or of an export",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="shards to use (the run's data.valid)"
    )
    parser.add_argument(
        "--sequences", type=between(int, 1), metavar="N", help="use only the first N (all)"
    )
    parser.add_argument(
        "--micro-batch", type=between(int, 1), default=8, metavar="B", help="sequences at once (8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the result; returns the exit status."""
    trained = load_trained(args.path)
    folder, manifest = _find_data(args.data, trained)
    batches = validation_batches(
        folder,
        manifest,
        rank=0,
        world_size=1,
        micro_batch=args.micro_batch,
        sequences=args.sequences,
    )
    total = min(args.sequences or manifest.num_samples, manifest.num_samples)
    result = perplexity(trained.model, _with_progress(batches, total), trained.device)
    report = {
        "checkpoint": str(trained.folder),
        "data": str(folder),
        "step": trained.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte(manifest.bytes_per_token),
    }
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return 0


def _find_data(chosen: Path | None, trained: Trained) -> tuple[Path, Manifest]:
    """The folder to validate on and its manifest, which must fit the model."""
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
    manifest = load_manifest(folder)
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


def _with_progress(
    batches: Iterator[tuple[Tensor, Tensor]], total: int
) -> Iterator[tuple[Tensor, Tensor]]:
    progress, done = ProgressLine(), 0
    progress("validating", done, total)
    for tokens, counts in batches:
        yield tokens, counts
        done += int(counts.sum())
        progress("validating", done, total)


def _as_text(report: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{report['checkpoint']} (step {report['step']:,}) on {report['data']}",
            f"  loss           {report['loss']:.4f}",
            f"  perplexity     {report['perplexity']:.3f}",
            f"  bits per byte  {report['bits_per_byte']:.4f}",
            f"  tokens         {report['tokens']:,}",
        ]
    )
