"""`moa-dist eval`: measures perplexity on held-out text, zero-shot tasks and BLEU.

It may also be started like training, once per rank; the ranks then share the work.
"""

from __future__ import annotations

import argparse
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from moa_dist.cli.arguments import add_json, add_model_path
from moa_dist.cli.held_out import (
    add_held_out_arguments,
    held_out_folders,
    num_sequences,
    with_progress,
)
from moa_dist.cli.output import print_result
from moa_dist.cli.progress import ProgressLine
from moa_dist.cli.rank_output import run_on_ranks
from moa_dist.cli.translate import add_search_arguments, warn_of_long_texts
from moa_dist.data.batches import held_out_batches
from moa_dist.data.decoding import read_lines
from moa_dist.data.folders import DataFolder
from moa_dist.errors import DataError
from moa_dist.evaluate.bleu import bleu, require_sacrebleu
from moa_dist.evaluate.perplexity import Perplexity, bits_per_byte, combined, perplexity
from moa_dist.evaluate.scoring import Request, Score, Scorer, scorer_of
from moa_dist.evaluate.tasks.task import Mean, Result
from moa_dist.evaluate.trained import Trained, load_trained, require
from moa_dist.evaluate.translate import Search
from moa_dist.evaluate.zero_shot import TASKS, Examples, parse_task, read_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_path(parser)
    add_held_out_arguments(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=_task,
        default=[],
        metavar="NAME=PATH",
        help=f"zero-shot tasks ({', '.join(TASKS)}) with the file or folder of each; a name may be "
        "repeated for more files. Replaces perplexity, unless --data is given too",
    )
    parser.add_argument(
        "--bleu",
        nargs=2,
        type=Path,
        metavar=("SOURCE", "REFERENCE"),
        help="files with one text per line: translate SOURCE and score it against REFERENCE with "
        "sacrebleu. Replaces perplexity, unless --data is given too",
    )
    add_search_arguments(parser)
    add_json(parser)


def _task(text: str) -> tuple[str, Path]:
    try:
        return parse_task(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(f"{error}; put the run before --tasks") from error


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the results; returns the exit status."""
    return run_on_ranks(partial(_evaluate, args))


def _evaluate(args: argparse.Namespace, rank: int, world_size: int) -> None:
    with_text = args.data is not None or not (args.tasks or args.bleu)
    if args.sequences is not None and not with_text:
        raise DataError(
            "--sequences counts sequences of held-out text, but --tasks and --bleu use whole "
            "files: omit it, or add --data"
        )
    examples = read_tasks(args.tasks)
    trained = load_trained(args.path)
    if args.tasks:
        require(trained, "causal", "--tasks")
        if trained.config.model.num_tasks:
            raise DataError(
                f"{trained.folder}: the model has a router per task of its training data, to none "
                "of which the texts of --tasks belong",
                path=trained.folder,
                key="tasks",
            )
    if args.bleu:
        require(trained, "translation", "--bleu")
        require_sacrebleu()
    report: dict[str, Any] = {"checkpoint": str(trained.folder), "step": trained.step}
    if args.bleu:
        report["bleu"] = _bleu(args, trained, rank)
    if with_text:
        report |= _perplexity(args, trained, rank, world_size)
    results = _run_tasks(examples, scorer_of(trained, args.micro_batch), rank)
    if rank == 0:
        if results:
            report["tasks"] = {name: _as_json(result) for name, result in results.items()}
        print_result(report, _as_text, as_json=args.json)


def _bleu(args: argparse.Namespace, trained: Trained, rank: int) -> dict[str, Any]:
    sources, references = (list(read_lines(file)) for file in args.bleu)
    if rank == 0:
        warn_of_long_texts(trained, sources)
    search = Search(args.beam, args.length_penalty)
    progress = partial(ProgressLine(), "translating") if rank == 0 else None
    found = bleu(trained, sources, references, search, batch=args.texts, progress=progress)
    return {
        "source": str(args.bleu[0]),
        "texts": len(sources),
        **search._asdict(),
        **found._asdict(),
    }


def _perplexity(
    args: argparse.Namespace, trained: Trained, rank: int, world_size: int
) -> dict[str, Any]:
    """Evaluate each folder; returns the result over all and, of several, that of each."""
    folders = held_out_folders(args.data, trained, args.task)
    results = [_perplexity_on(folder, args, trained, rank, world_size) for folder in folders]

    def report(which: slice) -> dict[str, Any]:
        together = combined(results[which])
        manifests = [folder.manifest for folder in folders[which]]
        return {
            "data": ", ".join(str(folder.path) for folder in folders[which]),
            "tokens": together.tokens,
            "loss": together.loss,
            "perplexity": together.perplexity,
            "bits_per_byte": bits_per_byte(results[which], trained.config.model, manifests),
        }

    whole = report(slice(None)) | {"looks_ahead": trained.config.model.looks_ahead}
    if len(folders) > 1:
        each = {folder.name: report(slice(i, i + 1)) for i, folder in enumerate(folders)}
        whole["folders"] = each
    return whole


def _perplexity_on(
    folder: DataFolder, args: argparse.Namespace, trained: Trained, rank: int, world_size: int
) -> Perplexity:
    batches = held_out_batches(
        trained.config,
        folder.path,
        folder.manifest,
        rank=rank,
        world_size=world_size,
        micro_batch=args.micro_batch,
        sequences=args.sequences,
        task=folder.task,
    )
    if rank == 0:
        total, sizes = num_sequences(folder.manifest, args.sequences), attrgetter("num_sequences")
        batches = with_progress(f"validating on {folder.name}", batches, total, sizes, world_size)
    return perplexity(trained.model, batches, trained.device)


def _run_tasks(examples: Examples, scorer: Scorer, rank: int) -> dict[str, Result]:
    line = ProgressLine()

    def score(name: str, requests: list[Request]) -> list[Score]:
        return scorer.score(requests, partial(line, name) if rank == 0 else None)

    return {
        name: TASKS[name].run(several, partial(score, name)) for name, several in examples.items()
    }


def _as_json(result: Result) -> dict[str, Any]:
    def each(means: dict[str, Mean]) -> dict[str, dict[str, float]]:
        return {name: value._asdict() for name, value in means.items()}

    return {
        "examples": result.num_examples,
        "cut": result.num_cut,
        **each(result.metrics),
        "groups": {kind: each(members) for kind, members in result.groups.items()},
    }


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"{report['checkpoint']} (step {report['step']:,})"]
    folders = report.get("folders", {})
    for name, found in folders.items():
        lines += _loss_lines(f"{name}: {found['data']}", found)
    if "loss" in report:
        title = f"all {len(folders)} together" if folders else report["data"]
        lines += _loss_lines(title, report)
    if "bleu" in report:
        found = report["bleu"]
        lines += [
            f"{found['source']}, {found['texts']:,} texts, beam {found['beam']}, length penalty "
            f"{found['length_penalty']:g}",
            f"  BLEU           {found['score']:.2f}",
            f"  signature      {found['signature']}",
        ]
    for task, result in report.get("tasks", {}).items():
        lines += _task_lines(task, result)
    return "\n".join(lines)


def _loss_lines(title: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"{title}, {found['tokens']:,} tokens",
        f"  loss           {found['loss']:.4f}",
        f"  perplexity     {found['perplexity']:.3f}",
    ]
    if found["bits_per_byte"] is not None:
        lines.append(f"  bits per byte  {found['bits_per_byte']:.4f}")
    if found.get("looks_ahead") is not None:
        lines.append(f"  not comparable: {found['looks_ahead']}")
    return lines


def _task_lines(task: str, result: dict[str, Any]) -> list[str]:
    lines = [f"{task}, {result['examples']:,} examples"]
    if result["cut"]:
        lines[0] += f"; {result['cut']:,} exceed the model's sequence length and lost their start"
    metrics = {name: each for name, each in result.items() if isinstance(each, dict)}
    groups = metrics.pop("groups")
    lines += _table("", metrics)
    for kind, members in groups.items():
        if len(members) > 1:
            lines.append(f"  accuracy by {kind}")
            lines += _table("  ", members)
    return lines


def _table(indent: str, means: dict[str, dict[str, float]]) -> list[str]:
    width = max(map(len, means))
    return [
        f"  {indent}{name:<{width}}  {mean['value']:.4f} ± {mean['standard_error']:.4f}"
        for name, mean in means.items()
    ]
