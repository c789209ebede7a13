"""`moa-dist plan`: what a run costs. Arguments and printing only; see `moa_dist.models.counts`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moa_dist.cli.arguments import between
from moa_dist.config import Config, find_layout_problems, load_config
from moa_dist.errors import ConfigError
from moa_dist.models.counts import Counts, States, count, states
from moa_dist.observe.units import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument(
        "--world-size", type=between(int, 1), metavar="W", help="number of ranks (expert_parallel)"
    )
    parser.add_argument(
        "--expert-parallel",
        type=between(int, 1),
        metavar="EP",
        help="instead of the configuration's parallel.expert_parallel",
    )
    parser.add_argument(
        "--zero-stage",
        type=int,
        choices=range(4),
        help="instead of the configuration's parallel.zero_stage",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; a layout without meaning raises `ConfigError`."""
    overrides = list(args.overrides)
    if args.expert_parallel is not None:
        overrides.append(f"parallel.expert_parallel={args.expert_parallel}")
    if args.zero_stage is not None:
        overrides.append(f"parallel.zero_stage={args.zero_stage}")
    config = load_config(args.path, overrides)
    ep = config.parallel.expert_parallel
    world_size = args.world_size or ep
    problems = find_layout_problems(config, world_size)
    if world_size % ep:
        raise ConfigError(problems, f"{args.path} on {world_size} ranks")
    counts = count(config.model, config.data.sequence_length)
    plan = _as_json(config, world_size, counts, states(counts, config, world_size), problems)
    print(json.dumps(plan, indent=2) if args.json else _as_text(plan))
    return 0


def _as_json(
    config: Config, world_size: int, counts: Counts, held: States, problems: list[str]
) -> dict[str, Any]:
    ep = config.parallel.expert_parallel
    return {
        "name": config.name,
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "experts": counts.experts,
            "dense": counts.dense,
            "per_rank": held.num_parameters,
        },
        "sequence_length": counts.sequence_length,
        "macs": {
            "by_part": counts.macs,
            "blocks": counts.block_macs,
            "head": counts.head_macs,
            "total": counts.total_macs,
        },
        "flops_per_token": counts.flops_per_token,
        "layout": {
            "world_size": world_size,
            "expert_parallel": ep,
            "expert_data_parallel": world_size // ep,
            "zero_stage": config.parallel.zero_stage,
            "precision": config.train.precision,
            "problems": problems,
        },
        "bytes_per_rank": {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "master": held.master,
            "total": held.total,
        },
    }


def _as_text(plan: dict[str, Any]) -> str:
    parameters, macs, layout = plan["parameters"], plan["macs"], plan["layout"]
    lines = [
        f"{plan['name']} on W {layout['world_size']} = ep {layout['expert_parallel']} x edp "
        f"{layout['expert_data_parallel']}, ZeRO {layout['zero_stage']}, {layout['precision']}",
        "",
        "parameters",
        *(f"  {name.replace('_', ' '):<12}{n:>16,}" for name, n in parameters.items()),
        "",
        f"multiply-accumulates, forward over one sequence of {plan['sequence_length']} tokens",
        *(
            f"  {name:<12}{short(n):>16}"
            for name, n in (
                macs["by_part"] | {"blocks": macs["blocks"], "total": macs["total"]}
            ).items()
        ),
        f"  {short(plan['flops_per_token'])} FLOPs per token, forward and backward",
        "",
        "MiB of states on the fullest rank, without activations and buffers",
        *(f"  {name:<12}{n / 2**20:>16,.1f}" for name, n in plan["bytes_per_rank"].items()),
    ]
    if layout["problems"]:
        lines += ["", "to start on these ranks, first:"]
        lines += [f"  - {problem}" for problem in layout["problems"]]
    return "\n".join(lines)
