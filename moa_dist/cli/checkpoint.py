"""`moa-dist checkpoint`: shows, verifies, converts and averages checkpoints."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa_dist.checkpoint.average import average
from moa_dist.checkpoint.check import damage, incomplete
from moa_dist.checkpoint.convert import convert
from moa_dist.checkpoint.format import Reader, checkpoints, step_of
from moa_dist.cli.arguments import add_json, between
from moa_dist.cli.output import print_result
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import find_checkpoint
from moa_dist.provenance import Provenance
from moa_dist.units import short

_PATH_HELP = "run folder, for all its checkpoints, or one checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `show`, `verify`, `convert` and `average`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show", help="list checkpoints, and which one training would resume from"
    )
    show.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help=_PATH_HELP)
    add_json(show)
    verify = actions.add_parser(
        "verify", help="read every byte; exit with 1 if anything is damaged"
    )
    verify.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help=_PATH_HELP)
    rewrite = actions.add_parser(
        "convert",
        help="rewrite a checkpoint in few files or without optimizer state (not needed to change "
        "the layout: every layout reads every checkpoint)",
    )
    rewrite.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="checkpoint, or a run for its newest"
    )
    rewrite.add_argument("output", type=Path, metavar="OUT", help="folder to create")
    rewrite.add_argument(
        "--files", type=between(int, 1), default=1, metavar="N", help="at most N files (1)"
    )
    rewrite.add_argument(
        "--weights-only",
        action="store_true",
        help="omit optimizer moments: a third of the size, for evaluation but not for resuming",
    )
    mean = actions.add_parser(
        "average", help="average the weights of a run's last checkpoints, to evaluate or translate"
    )
    mean.add_argument("path", type=Path, metavar="RUN", help="folder of a run")
    mean.add_argument("output", type=Path, metavar="OUT", help="folder to create")
    mean.add_argument(
        "--last", type=between(int, 1), default=10, metavar="N", help="at most N checkpoints (10)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit status, 1 if `verify` finds damage."""
    if args.action == "convert":
        index = convert(
            find_checkpoint(args.path),
            args.output,
            num_files=args.files,
            weights_only=args.weights_only,
        )
        size = short(sum(index.files.values()))
        print(f"{args.output}: step {index.step:,}, {len(index.files)} files, {size}B")
        return 0
    if args.action == "average":
        chosen = checkpoints(args.path)[-args.last :]
        if not chosen:
            raise DataError(f"{args.path}: no checkpoint found; pass the folder of a run")
        average(chosen, args.output)
        steps = ", ".join(f"{step_of(checkpoint):,}" for checkpoint in chosen)
        print(f"{args.output}: average of the checkpoints of steps {steps}")
        return 0
    folders = checkpoints(args.path) or [find_checkpoint(args.path)]
    if args.action == "verify":
        return _verify(folders)
    print_result(_report(folders), _as_text, as_json=args.json)
    return 0


def _verify(folders: list[Path]) -> int:
    found = {folder: damage(folder) for folder in folders}
    for folder, problems in found.items():
        print(f"{folder}: {'damaged' if problems else 'ok'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _report(folders: list[Path]) -> dict[str, Any]:
    """Describe checkpoints, reading them as `resume: auto` does: from the newest to a valid one."""
    rows, chosen = [], None
    for folder in reversed(folders):
        row: dict[str, Any] = {"checkpoint": str(folder), "problem": None}
        try:
            index = Reader(folder).index
        except DataError as error:
            rows.append(row | {"state": "damaged", "problem": str(error)})
            continue
        problems = damage(folder) if chosen is None else incomplete(folder, index)
        state = "damaged" if problems else "valid" if chosen is None else "complete"
        if state == "valid":
            chosen = str(folder)
        parallel = index.config.parallel
        rows.append(
            row
            | {
                "step": index.step,
                "samples": index.samples,
                "bytes": sum(index.files.values()),
                "layout": {
                    "world_size": index.world_size,
                    "expert_parallel": parallel.expert_parallel,
                    "zero_stage": parallel.zero_stage,
                },
                "provenance": index.provenance and asdict(index.provenance),
                "state": state,
                "problem": str(problems[0]) if problems else None,
            }
        )
    return {"checkpoints": rows[::-1], "continue_from": chosen}


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"{'step':>10}  {'samples':>12}  {'size':>7}  {'layout':<18}  state"]
    written_by = None
    for row in report["checkpoints"]:
        if "step" in row:
            layout = row["layout"]
            place = f"W {layout['world_size']} ep {layout['expert_parallel']} "
            place += f"ZeRO {layout['zero_stage']}"
            size = f"{short(row['bytes'])}B"
            line = f"{row['step']:>10,}  {row['samples']:>12,}  {size:>7}  {place:<18}"
        else:
            line = f"{Path(row['checkpoint']).name.removeprefix('step-').lstrip('0'):>10}{'':45}"
        problem = f": {row['problem']}" if row["problem"] else ""
        lines.append(f"{line}  {row['state']}{problem}")
        if row.get("provenance") and row["provenance"] != written_by:
            written_by = row["provenance"]
            lines.append(f"{'':>10}  by {Provenance(**written_by)}")
    chosen = report["continue_from"]
    lines.append(
        f"checkpoint.resume=auto resumes from {chosen}"
        if chosen
        else "checkpoint.resume=auto stops with an error: no checkpoint is valid"
    )
    return "\n".join(lines)
