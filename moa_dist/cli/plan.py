"""`moa-dist plan`: counts what a run costs before it starts; `moa_dist.plan` does the work."""

from __future__ import annotations

import argparse

from moa_dist.cli.arguments import add_json, add_overrides, between
from moa_dist.cli.output import print_result
from moa_dist.cli.plan_cluster import cluster_as_json, cluster_as_text
from moa_dist.cli.plan_counts import counts_as_json, counts_as_text
from moa_dist.config import Config, find_layout_problems, load_config
from moa_dist.errors import ConfigError
from moa_dist.plan.cluster import GPUS, Cluster, with_figures
from moa_dist.plan.time import Assumptions

_MOST_GPUS = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="CONFIG", help="YAML configuration")
    add_overrides(parser)
    add_json(parser)
    _add_layout_arguments(parser)
    _add_cluster_arguments(parser)


def _add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--world-size",
        type=between(int, 1),
        metavar="W",
        help="number of ranks (default: parallel.expert_parallel)",
    )
    layout.add_argument(
        "--expert-parallel",
        type=between(int, 1),
        metavar="EP",
        help="overrides parallel.expert_parallel",
    )
    layout.add_argument(
        "--zero-stage",
        type=int,
        choices=range(4),
        help="overrides parallel.zero_stage",
    )
    layout.add_argument(
        "--memory-gib",
        type=between(float, 0),
        metavar="GIB",
        help="memory per rank, for expert_exchange auto (default: unlimited, or with --gpus the "
        "data sheet's)",
    )


def _add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group(
        "cluster", "print memory, time and the best layouts on GPUs instead of counts"
    )
    cluster.add_argument(
        "--gpus", type=between(int, 1, _MOST_GPUS), metavar="N", help="number of GPUs"
    )
    cluster.add_argument(
        "--gpu", choices=GPUS, default="h100", help="GPU model (default %(default)s)"
    )
    cluster.add_argument(
        "--gpus-per-node",
        type=between(int, 1, _MOST_GPUS),
        default=8,
        metavar="N",
        help="GPUs joined by fast links (default %(default)s)",
    )
    for option, meaning in (
        ("--link-gb", "GB/s that a GPU sends within its node"),
        ("--network-gb", "GB/s that a GPU sends to other nodes"),
    ):
        cluster.add_argument(
            option,
            type=between(float, 1e-3),
            metavar="GB",
            help=f"{meaning} (default: data sheet)",
        )
    for name, meaning in (
        ("matmul", "the peak FLOPs that matrix products reach"),
        ("memory", "memory bandwidth that expert rows reach"),
        ("network", "link bandwidth that collectives reach"),
    ):
        cluster.add_argument(
            f"--{name}-efficiency",
            type=between(float, 0.01, 1),
            default=getattr(Assumptions, f"{name}_efficiency"),
            metavar="SHARE",
            help=f"share of {meaning} (default %(default)s)",
        )
    cluster.add_argument(
        "--layouts",
        type=between(int, 1),
        default=8,
        metavar="N",
        help="number of best layouts to show (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit status.

    Raises ConfigError for a layout that cannot exist.
    """
    overrides = list(args.overrides)
    if args.expert_parallel is not None:
        overrides.append(f"parallel.expert_parallel={args.expert_parallel}")
    if args.zero_stage is not None:
        overrides.append(f"parallel.zero_stage={args.zero_stage}")
    config = load_config(args.path, overrides)
    if args.gpus is not None:
        cluster = _cluster(args, config)
        assumed = Assumptions(
            args.matmul_efficiency, args.memory_efficiency, args.network_efficiency
        )
        plan = cluster_as_json(config, cluster, assumed, args.layouts)
        print_result(plan, cluster_as_text, as_json=args.json)
        return 0
    ep = config.parallel.expert_parallel
    world_size = args.world_size or ep
    if world_size % ep:
        problems = find_layout_problems(config, world_size)
        raise ConfigError(problems, f"{args.path} on {world_size} ranks")
    plan = counts_as_json(config, world_size, _bytes(args.memory_gib))
    print_result(plan, counts_as_text, as_json=args.json)
    return 0


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _cluster(args: argparse.Namespace, config: Config) -> Cluster:
    if args.world_size not in (None, args.gpus):
        raise ConfigError(["--gpus already gives the number of ranks: omit --world-size"])
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ConfigError(
            [f"--gpus {args.gpus} is not a multiple of --gpus-per-node {args.gpus_per_node}"]
        )
    gpu = with_figures(
        GPUS[args.gpu],
        memory=_bytes(args.memory_gib),
        link_bandwidth=args.link_gb and args.link_gb * 1e9,
        network_bandwidth=args.network_gb and args.network_gb * 1e9,
    )
    if gpu.flops(config.train.precision) is None:
        raise ConfigError(
            [
                f"`train.precision` is {config.train.precision}, for which GPU speeds are unknown; "
                "add train.precision=bf16"
            ]
        )
    return Cluster(args.gpus, min(args.gpus_per_node, args.gpus), gpu)
