"""`moa-dist recipes`: the configurations that come with the package, and what they cost.

Printing only; see `moa_dist.config.recipe`. Every number is counted, none is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from pathlib import Path
from typing import Any

from moa_dist.config import Config, load_config
from moa_dist.config.recipe import Recipe, read_recipe, shipped_recipes
from moa_dist.config.run import tokens_per_sample
from moa_dist.config.schema import closest
from moa_dist.errors import ConfigError
from moa_dist.models.counts import count
from moa_dist.units import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them, such as moeut/244m")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print all recipes as a table, or one in full; an unknown name raises `ConfigError`."""
    paths = shipped_recipes()
    if args.name is None:
        described = [_describe(name, path) for name, path in paths.items()]
        print(json.dumps(described, indent=2) if args.json else _table(described))
        return 0
    if args.name not in paths:
        meant = closest(args.name, paths)
        hint = f"; did you mean `{meant}`?" if meant else "; moa-dist recipes lists all"
        raise ConfigError([f"there is no recipe `{args.name}`{hint}"], "moa-dist recipes")
    described_one = _describe(args.name, paths[args.name])
    print(json.dumps(described_one, indent=2) if args.json else _in_full(described_one))
    return 0


def _describe(name: str, path: Path) -> dict[str, Any]:
    recipe, config = read_recipe(path), load_config(path)
    assert isinstance(recipe, Recipe), "shipped_recipes names only files that have one"
    counts = count(config.model, config.data.sequence_length)
    return {
        "name": name,
        **recipe.model_dump(),
        "parameters": counts.total,
        "active_parameters": counts.active,
        # Of a forward over a whole sequence, as the papers count, without the output head.
        "macs_per_token": counts.block_macs / counts.sequence_length,
        "tokens": config.train.steps * config.train.global_batch * tokens_per_sample(config),
        "file": str(_near(path)),
        "command": _command(config, path),
    }


def _near(path: Path) -> str:
    """From the working directory if the file lies below it."""
    resolved = path.resolve()
    here = Path.cwd()
    return os.path.relpath(resolved) if resolved.is_relative_to(here) else str(resolved)


def _command(config: Config, path: Path) -> str:
    ranks = config.parallel.expert_parallel
    start = f"deepspeed --num_gpus {ranks}" if ranks > 1 else "python"
    data = f"data.train={config.data.train} data.valid={config.data.valid}"
    return f"{start} launcher/train.py --config {_near(path)} {data}"


def _table(described: list[dict[str, Any]]) -> str:
    head = ["recipe", "parameters", "active", "MACs/token", "table row"]
    rows = [
        [
            each["name"],
            short(each["parameters"]),
            short(each["active_parameters"]),
            short(each["macs_per_token"]),
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
    about = "MACs: forward, output head apart. One in full: moa-dist recipes NAME"
    return "\n".join([*lines, "", about])


def _in_full(each: dict[str, Any]) -> str:
    numbers = (
        f"{short(each['parameters'])} parameters, {short(each['active_parameters'])} active per "
        f"token; {short(each['macs_per_token'])} multiply-accumulates per token, forward, output "
        f"head apart; trained on {short(each['tokens'])} tokens"
    )
    told = {
        "paper": each["paper"],
        "row": each["row"],
        "size": numbers,
        "expect": each["expect"],
        "file": each["file"],
    }
    lines = [each["name"]]
    for label, text in told.items():
        lines += textwrap.wrap(
            text, 98, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    # In one line, to be copied.
    return "\n".join([*lines, f"  start   {each['command']}"])
