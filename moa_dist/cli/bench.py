"""`moa-dist bench`: measures ratios within one run; `moa_dist.bench` does the work."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moa_dist.bench.measure import Table, as_json, as_text
from moa_dist.bench.sections import SECTIONS, SHARED_SECTIONS, WHEN_EMPTY, load_section
from moa_dist.bench.setting import Setting
from moa_dist.bench.spawned_ranks import in_a_job, in_this_job
from moa_dist.cli.arguments import add_json, between
from moa_dist.config import load_config
from moa_dist.distributed.device import default_device, keep_freed_memory, set_product_precision
from moa_dist.errors import ConfigError
from moa_dist.evaluate.trained import config_of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    every = (SECTIONS | SHARED_SECTIONS).items()
    sections = "; ".join(f"{name}: {line}" for name, (_, line) in every)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION | key=value",
        help=f"sections to measure, all by default ({sections}), and settings to change",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML configuration")
    what.add_argument(
        "--run",
        type=Path,
        help="folder of a run or an export: use its configuration, and measure its layers with "
        "learned routers too, on the run's held-out text",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument(
        "--threads",
        type=between(int, 1),
        help="CPU threads of a process (all, shared among ranks)",
    )
    parser.add_argument(
        "--sequences", type=between(int, 1), help="sequences per call (train.micro_batch)"
    )
    parser.add_argument(
        "--repetitions",
        type=between(int, 1),
        default=7,
        help="rounds, in which alternatives take turns",
    )
    parser.add_argument(
        "--ranks",
        type=between(int, 1),
        help=f"ranks to start on this machine for {', '.join(SHARED_SECTIONS)} (one per GPU, or "
        "2); the ranks of a `deepspeed` or `torchrun` job measure only these sections",
    )
    add_json(parser, "print JSON, with every round")


def run(args: argparse.Namespace) -> int:
    """Measure and print, table by table; returns the exit status."""
    names = [word for word in args.overrides if "=" not in word]
    changes = [word for word in args.overrides if "=" in word]
    in_job = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device(args.device) if args.device else default_device()
    ranks = args.ranks or (torch.cuda.device_count() if device.type == "cuda" else 2)
    _check(names, args, device, ranks, in_job)
    config = load_config(args.config, changes) if args.config else config_of_run(args.run, changes)
    if args.threads:
        torch.set_num_threads(args.threads)
    set_product_precision(config.train.precision)
    keep_freed_memory(device)
    sequences = args.sequences or config.train.micro_batch
    setting = Setting(config, device, sequences, args.repetitions, run=args.run)
    speaks = not in_job or os.environ.get("RANK") == "0"
    if speaks and not args.json:
        print(" ".join(f"{key} {value}" for key, value in _where(setting).items()))
    found = (
        in_this_job(names or list(SHARED_SECTIONS), setting)
        if in_job
        else _alone(names or [*SECTIONS, *SHARED_SECTIONS], setting, ranks, args.threads)
    )
    results = []
    for name, table in found:
        results.append({"section": name, **as_json(table)})
        if not args.json:
            print(f"\n{as_text(table)}", flush=True)
    if speaks:
        empty = set(names) - {result["section"] for result in results}
        for name in sorted(empty):
            print(f"{name}: nothing to measure: {WHEN_EMPTY[name]}", file=sys.stderr)
        if args.json:
            print(json.dumps({"where": _where(setting), "tables": results}, indent=2))
    return 0


def _check(
    names: list[str], args: argparse.Namespace, device: torch.device, ranks: int, in_job: bool
) -> None:
    listed = ", ".join([*SECTIONS, *SHARED_SECTIONS])
    problems = [
        f"unknown section `{name}`; available: {listed}"
        for name in names
        if name not in SECTIONS | SHARED_SECTIONS
    ]
    if in_job:
        problems += [
            f"`{name}` runs in one process: start `moa-dist bench {name}` without a launcher"
            for name in names
            if name in SECTIONS
        ]
        if args.ranks:
            problems.append(
                "--ranks starts ranks, but this process already belongs to a job: omit it"
            )
        if args.device == "cpu" and torch.cuda.is_available():
            problems.append("--device cpu, but ranks of a job use the GPUs that are visible")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            problems.append("--device cuda, but torch finds no GPU; use --device cpu")
        elif ranks > torch.cuda.device_count():
            problems.append(
                f"--ranks {ranks}, but only {torch.cuda.device_count()} GPUs are available"
            )
    if problems:
        raise ConfigError(problems, "bench")


def _alone(
    names: list[str], setting: Setting, ranks: int, threads: int | None
) -> Iterator[tuple[str, Table]]:
    for name in names:
        if name in SECTIONS:
            for table in load_section(name)(setting):
                yield name, table
    if shared := [name for name in names if name in SHARED_SECTIONS]:
        threads = threads or max(1, torch.get_num_threads() // ranks)
        yield from in_a_job(shared, setting, ranks, threads)


def _where(setting: Setting) -> dict[str, Any]:
    return {
        "model": setting.config.name,
        "device": f"{setting.device.type} {setting.device_name}".strip(),
        "threads": torch.get_num_threads(),
        "precision": setting.config.train.precision,
        "tokens": setting.tokens,
        "torch": torch.__version__,
    }
