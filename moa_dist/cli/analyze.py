"""`moa-dist analyze`: shows what experts and heads do; `moa_dist.analyze` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moa_dist.analyze.analyze import (
    attention_results,
    depth_results,
    observe,
    router_results,
    token_mean_results,
)
from moa_dist.analyze.plots import can_plot, write_plots
from moa_dist.analyze.results import ANALYSIS_FILE, ANALYSIS_FOLDER, Analysis, save_analysis
from moa_dist.analyze.summary import summary
from moa_dist.checkpoint.format import checkpoints
from moa_dist.cli.arguments import add_model_path, between
from moa_dist.cli.held_out import (
    add_held_out_arguments,
    held_out_folder,
    num_sequences,
    with_progress,
)
from moa_dist.cli.output import not_written
from moa_dist.config.sequence_groups import whole_groups
from moa_dist.data.batches import held_out_batches, in_documents, of_tasks
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import PairManifest
from moa_dist.data.validation import validation_batches
from moa_dist.evaluate.trained import Trained, load_trained
from moa_dist.models.objective import Batch
from moa_dist.report.analysis import analysis_page

PAGE_FILE = "analysis.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_path(parser)
    add_held_out_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (`analysis` in the folder of the run, average or export); moa-dist "
        "report includes the analysis in a run's folder",
    )
    parser.add_argument(
        "--min-count",
        type=between(int, 1),
        default=20,
        metavar="N",
        help="list only tokens that occur at least N times, because PMI favors rare ones (20)",
    )


def run(args: argparse.Namespace) -> int:
    """Write numbers, pictures and page, and print a summary; returns the exit status."""
    trained = load_trained(args.path)
    output: Path = args.output or _whole_run(trained.folder) / ANALYSIS_FOLDER
    _make(output)
    analysis = _analyze(args, trained)
    pictures = _write(analysis, output)
    print(summary(analysis))
    names = [PAGE_FILE, ANALYSIS_FILE, *(picture.name for picture in pictures)]
    print(f"\nwrote to {output}: {', '.join(names)}")
    if not pictures:
        print("no PNG pictures without matplotlib: pip install 'moa-dist[plots]'")
    return 0


def _analyze(args: argparse.Namespace, trained: Trained) -> Analysis:
    folder = held_out_folder(args.data, trained, args.task)
    batches, manifest = _batches(args, trained, folder), folder.manifest
    total = num_sequences(manifest, args.sequences)
    seen = observe(trained.model, with_progress("reading", batches, total, _size), trained.device)
    return Analysis(
        name=trained.config.name,
        step=trained.step,
        data=str(folder.path),
        tokens=sum(int(occurrences_V.sum()) for occurrences_V in seen.occurrences_V.values()),
        sequence_length=manifest.block_length,
        min_count=args.min_count,
        routers=router_results(
            trained.model, seen, args.min_count, lambda token: trained.tokenizer.decode([token])
        ),
        attention=attention_results(seen),
        depths=depth_results(seen),
        token_means=token_mean_results(seen),
    )


def _batches(args: argparse.Namespace, trained: Trained, folder: DataFolder) -> Iterator[Batch]:
    _, path, manifest, task = folder
    if isinstance(manifest, PairManifest):
        yield from held_out_batches(
            trained.config,
            path,
            manifest,
            rank=0,
            world_size=1,
            micro_batch=args.micro_batch,
            sequences=args.sequences,
        )
        return
    # A masked model reads unmasked text: mask tokens would choose experts of their own.
    for tokens, counts in validation_batches(
        path,
        manifest,
        rank=0,
        world_size=1,
        micro_batch=whole_groups(args.micro_batch, trained.config.model),
        sequences=args.sequences,
    ):
        token_mask = None if bool(counts.all()) else counts[:, None].expand_as(tokens)
        batch = in_documents(Batch(tokens, token_mask), trained.config, manifest)
        yield of_tasks(batch, [task] * batch.num_sequences)


def _size(batch: Batch) -> int:
    return batch.num_sequences if batch.token_mask is None else int(batch.token_mask.any(1).sum())


def _whole_run(folder: Path) -> Path:
    """Return the run folder of a checkpoint; an average or an export is its own folder."""
    return folder.parent if folder in checkpoints(folder.parent) else folder


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(output, error) from error


def _write(analysis: Analysis, output: Path) -> list[Path]:
    try:
        save_analysis(analysis, output)
        page = analysis_page(analysis).encode("utf-8", errors="replace")
        (output / PAGE_FILE).write_bytes(page)
        return write_plots(analysis, output) if can_plot() else []
    except OSError as error:
        raise not_written(output, error) from error
