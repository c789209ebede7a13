"""`moa-dist recipes`: lists the configurations in the package, with the sizes of their models.

All numbers are counted from the configurations; `moa_dist.config.recipe` reads the rest.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import Any

from moa_dist.cli.arguments import add_json
from moa_dist.cli.output import print_result
from moa_dist.config import Config, load_config
from moa_dist.config.recipe import Recipe, read_recipe, shipped_recipes
from moa_dist.config.run import tokens_per_sample
from moa_dist.config.schema import closest
from moa_dist.errors import ConfigError
from moa_dist.models.counts import Work, count
from moa_dist.units import short

GPUS_PER_NODE = 8
"""What a job of several nodes is shown with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show one in full, such as moeut/244m"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print all recipes as a table, or one in full; returns the exit status.

    Raises ConfigError for an unknown name.
    """
    paths = shipped_recipes()
    if args.name is None:
        described = [_describe(name, path) for name, path in paths.items()]
        print_result(described, _table, as_json=args.json)
        return 0
    if args.name not in paths:
        meant = closest(args.name, paths)
        hint = f"; did you mean `{meant}`?" if meant else "; `moa-dist recipes` lists all"
        raise ConfigError([f"unknown recipe `{args.name}`{hint}"], "moa-dist recipes")
    print_result(_describe(args.name, paths[args.name]), _in_full, as_json=args.json)
    return 0


def _describe(name: str, path: Path) -> dict[str, Any]:
    recipe, config = read_recipe(path), load_config(path)
    assert isinstance(recipe, Recipe), "shipped_recipes names only files that have one"
    counts = count(config.model, config.data.sequence_length)
    return {
        "name": name,
        **recipe.model_dump(),
        "parameters": counts.total,
        **_work(counts.training, counts.sequence_length),
        "evaluation": _work(counts.evaluation, counts.sequence_length),
        "tokens": config.train.steps * config.train.global_batch * tokens_per_sample(config),
        "file": str(_near(path)),
        "command": _command(config, path, recipe.ranks),
    }


def _work(work: Work, length: int) -> dict[str, float]:
    return {
        "active_parameters": work.active,
        # For a forward pass over a whole sequence, without the output head, as papers count.
        "macs_per_token": work.block_macs / length,
    }


def _near(path: Path) -> str:
    """Return the path relative to the working directory if the file lies below it."""
    resolved = path.resolve()
    here = Path.cwd()
    return os.path.relpath(resolved) if resolved.is_relative_to(here) else str(resolved)


def _command(config: Config, path: Path, ranks: int) -> str:
    data = f"data.train={config.data.train} data.valid={config.data.valid}"
    run = f"--config {_near(path)} {data}"
    if ranks == 1:
        return f"python launcher/train.py {run}"
    if ranks <= GPUS_PER_NODE:
        return f"deepspeed --num_gpus {ranks} launcher/train.py {run}"
    nodes = f"--nodes {ranks // GPUS_PER_NODE} --gpus-per-node {GPUS_PER_NODE}"
    return f"python launcher/job.py slurm {nodes} {run}"


def _table(described: list[dict[str, Any]]) -> str:
    head = ["recipe", "parameters", "active", "MACs/token", "table row"]
    rows = [
        [
            each["name"],
            short(each["parameters"]),
            _both(each, "active_parameters"),
            _both(each, "macs_per_token"),
            f"{each['paper'].split(',')[0]}: {each['row'].split(';')[0]}",
        ]
        for each in described
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {total:>{widths[1]}}  {active:>{widths[2]}}  "
        f"{macs:>{widths[3]}}  {row}"
        for name, total, active, macs, row in [head, *rows]
    ]
    about = [
        "MACs: forward pass without the output head. Where two numbers are given, the first is of",
        "training, the second of evaluation. Details: moa-dist recipes NAME",
    ]
    return "\n".join([*lines, "", *about])


def _of_two(each: dict[str, Any]) -> str:
    differs = any(each[name] != number for name, number in each["evaluation"].items())
    return " (training/evaluation)" if differs else ""


def _both(each: dict[str, Any], name: str) -> str:
    """Format a number of training and, if that is another, of evaluation."""
    training, evaluation = short(each[name]), short(each["evaluation"][name])
    return training if training == evaluation else f"{training}/{evaluation}"


def _in_full(each: dict[str, Any]) -> str:
    numbers = (
        f"{short(each['parameters'])} parameters, {_both(each, 'active_parameters')} active per "
        f"token; {_both(each, 'macs_per_token')} multiply-accumulates per token in the forward "
        f"pass without the output head{_of_two(each)}; trained on {short(each['tokens'])} tokens"
    )
    fields = {
        "paper": each["paper"],
        "row": each["row"],
        "size": numbers,
        "expect": each["expect"],
        "ranks": f"{each['ranks']:,}",
        "file": each["file"],
    }
    lines = [each["name"]]
    for label, text in fields.items():
        lines += textwrap.wrap(
            text, 98, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    # On one line, so that it can be copied.
    return "\n".join([*lines, f"  start   {each['command']}"])
