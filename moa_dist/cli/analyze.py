"""`moa-dist analyze`: what experts and heads do. Arguments and writing; see `moa_dist.analyze`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moa_dist.analyze.analyze import attention_results, observe, router_results
from moa_dist.analyze.plots import can_plot, write_plots
from moa_dist.analyze.results import ANALYSIS_FILE, ANALYSIS_FOLDER, Analysis, save_analysis
from moa_dist.analyze.summary import summary
from moa_dist.checkpoint.format import checkpoints
from moa_dist.cli.arguments import between
from moa_dist.cli.held_out import held_out_data, num_sequences, with_progress
from moa_dist.config.model import whole_groups
from moa_dist.data.batches import held_out_batches
from moa_dist.data.manifest import AnyManifest, PairManifest
from moa_dist.data.validation import validation_batches
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import Trained, load_trained
from moa_dist.models.objective import Batch
from moa_dist.report.analysis import analysis_page

PAGE_FILE = "analysis.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, for its newest checkpoint, of one checkpoint, or of an export",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="shards to read (the run's data.valid)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (`analysis` in the folder of the run, average or export); "
        "moa-dist report shows that of a run",
    )
    parser.add_argument(
        "--sequences", type=between(int, 1), metavar="N", help="read only the first N (all)"
    )
    parser.add_argument(
        "--micro-batch", type=between(int, 1), default=8, metavar="B", help="sequences at once (8)"
    )
    parser.add_argument(
        "--min-count",
        type=between(int, 1),
        default=20,
        metavar="N",
        help="name only tokens that occur so often in the text, as PMI favours rare ones (20)",
    )


def run(args: argparse.Namespace) -> int:
    """Write numbers, pictures and page, and say what they show; returns the exit status."""
    trained = load_trained(args.path)
    output: Path = args.output or _whole_run(trained.folder) / ANALYSIS_FOLDER
    _make(output)
    analysis = _analyze(args, trained)
    pictures = _write(analysis, output)
    print(summary(analysis))
    print(f"\n{output}: {PAGE_FILE}, to open in a browser, {ANALYSIS_FILE}, ", end="")
    if pictures:
        print(", ".join(picture.name for picture in pictures))
    else:
        print("no pictures as PNG: pip install 'moa-dist[plots]' for these")
    return 0


def _analyze(args: argparse.Namespace, trained: Trained) -> Analysis:
    folder, manifest = held_out_data(args.data, trained)
    batches = _batches(args, trained, folder, manifest)
    total = num_sequences(manifest, args.sequences)
    seen = observe(trained.model, with_progress("reading", batches, total, _size), trained.device)
    return Analysis(
        name=trained.config.name,
        step=trained.step,
        data=str(folder),
        tokens=sum(int(occurrences_V.sum()) for occurrences_V in seen.occurrences_V.values()),
        sequence_length=manifest.block_length,
        min_count=args.min_count,
        routers=router_results(
            trained.model, seen, args.min_count, lambda token: trained.tokenizer.decode([token])
        ),
        attention=attention_results(seen),
    )


def _batches(
    args: argparse.Namespace, trained: Trained, folder: Path, manifest: AnyManifest
) -> Iterator[Batch]:
    if isinstance(manifest, PairManifest):
        yield from held_out_batches(
            trained.config,
            folder,
            manifest,
            rank=0,
            world_size=1,
            micro_batch=args.micro_batch,
            sequences=args.sequences,
        )
        return
    # A masked model reads its text as it is: what is hidden would choose experts of its own.
    for tokens, counts in validation_batches(
        folder,
        manifest,
        rank=0,
        world_size=1,
        micro_batch=whole_groups(args.micro_batch, trained.config.model),
        sequences=args.sequences,
    ):
        token_mask = None if bool(counts.all()) else counts[:, None].expand_as(tokens)
        yield Batch(tokens, token_mask)


def _size(batch: Batch) -> int:
    return batch.num_sequences if batch.token_mask is None else int(batch.token_mask.any(1).sum())


def _whole_run(folder: Path) -> Path:
    """The run that a checkpoint is one of; an average and an export stand for themselves."""
    return folder.parent if folder in checkpoints(folder.parent) else folder


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(output, error) from error


def _not_written(output: Path, error: OSError) -> DataError:
    return DataError(f"{output}: not written: {error.strerror}; choose another place with --output")


def _write(analysis: Analysis, output: Path) -> list[Path]:
    try:
        save_analysis(analysis, output)
        page = analysis_page(analysis).encode("utf-8", errors="replace")
        (output / PAGE_FILE).write_bytes(page)
        return write_plots(analysis, output) if can_plot() else []
    except OSError as error:
        raise _not_written(output, error) from error
