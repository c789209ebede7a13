"""`moa-dist bench`: ratios in one run. Arguments and printing only; see `moa_dist.bench`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moa_dist.bench.measure import Table, as_json, as_text
from moa_dist.bench.ranks import in_a_job, in_this_job
from moa_dist.bench.sections import SECTIONS, SHARED_SECTIONS, load_section
from moa_dist.bench.setting import Setting
from moa_dist.cli.arguments import between
from moa_dist.config import load_config
from moa_dist.errors import ConfigError
from moa_dist.evaluate.trained import load_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    every = (SECTIONS | SHARED_SECTIONS).items()
    sections = "; ".join(f"{name}: {line}" for name, (_, line) in every)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"all if none is named ({sections})"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        nargs="+",
        metavar=("FILE", "key=value"),
        help="YAML file of the model, and changes to it",
    )
    what.add_argument(
        "--run",
        type=Path,
        help="a trained run, for its configuration, and to measure its layers with their learned "
        "routers on its held-out text",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--threads", type=between(int, 1), help="of a CPU, all if absent")
    parser.add_argument(
        "--sequences", type=between(int, 1), help="per call, instead of train.micro_batch"
    )
    parser.add_argument(
        "--repetitions", type=between(int, 1), default=7, help="rounds in which all take turns"
    )
    parser.add_argument(
        "--ranks",
        type=between(int, 1),
        help=f"for {', '.join(SHARED_SECTIONS)}: started on this machine, one per GPU or 2 if "
        "absent; in a job of `deepspeed` or `torchrun` its ranks measure these sections alone",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every round")


def run(args: argparse.Namespace) -> int:
    """Measure and print, table by table."""
    path, *words = args.config or [None]  # sections may follow as well as precede it
    overrides = [word for word in words if "=" in word]
    names = [*args.sections, *(word for word in words if "=" not in word)]
    in_job = int(os.environ.get("WORLD_SIZE", "1")) > 1
    _check(names, in_job)
    config = load_trained(args.run).config if path is None else load_config(path, overrides)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["--device cuda, but torch sees no GPU; use --device cpu"], "bench")
    if args.threads:
        torch.set_num_threads(args.threads)
    sequences = args.sequences or config.train.micro_batch
    setting = Setting(config, device, sequences, args.repetitions, args.run)
    speaks = not in_job or os.environ.get("RANK") == "0"
    where = _where(setting)
    if speaks and not args.json:
        print(" ".join(f"{key} {value}" for key, value in where.items()))
    results = []
    for name, table in _in_job(names, setting) if in_job else _alone(names, setting, args):
        results.append({"section": name, **as_json(table)})
        if not args.json:
            print(f"\n{as_text(table)}", flush=True)
    if speaks and args.json:
        print(json.dumps({"where": where, "tables": results}, indent=2))
    return 0


def _check(names: list[str], in_job: bool) -> None:
    listed = ", ".join([*SECTIONS, *SHARED_SECTIONS])
    problems = [
        f"no section `{name}`; there are {listed}"
        for name in names
        if name not in SECTIONS | SHARED_SECTIONS
    ]
    if in_job:
        problems += [
            f"`{name}` is measured by one process: start `moa-dist bench {name}` by itself"
            for name in names
            if name in SECTIONS
        ]
    if problems:
        raise ConfigError(problems, "bench")


def _in_job(names: list[str], setting: Setting) -> Iterator[tuple[str, Table]]:
    return in_this_job(names or list(SHARED_SECTIONS), setting)


def _alone(
    names: list[str], setting: Setting, args: argparse.Namespace
) -> Iterator[tuple[str, Table]]:
    names = names or [*SECTIONS, *SHARED_SECTIONS]
    for name in names:
        if name in SECTIONS:
            for table in load_section(name)(setting):
                yield name, table
    if shared := [name for name in names if name in SHARED_SECTIONS]:
        ranks = args.ranks or (torch.cuda.device_count() if setting.device.type == "cuda" else 2)
        threads = args.threads or max(1, torch.get_num_threads() // ranks)
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
