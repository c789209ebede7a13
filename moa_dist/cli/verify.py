"""`moa-dist verify`: checks that a parallel layout takes the same steps as one process.

Started like training, once per rank; `moa_dist.verify.verify` does the work.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from moa_dist.cli.arguments import add_overrides
from moa_dist.cli.rank_output import say_once
from moa_dist.config import Config, find_layout_problems, load_config
from moa_dist.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from moa_dist.distributed.start import DistContext
    from moa_dist.verify.compare import Check
    from moa_dist.verify.verify import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Verify on all ranks; returns 0 if equal, 1 if not, 2 if the configuration cannot run."""
    rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        config = load_config(args.config, args.overrides)
        problems = find_layout_problems(config, world_size)
        if problems:
            raise ConfigError(problems, f"{config.name} on {world_size} ranks")
    except ConfigError as error:
        say_once(rank, str(error))
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny: threads would only add overhead
    try:
        return _verify(config)
    except TrainingError as error:
        say_once(rank, str(error))
        return 2


def _verify(config: Config) -> int:
    import torch.distributed as dist

    from moa_dist.distributed.mesh import make_mesh
    from moa_dist.distributed.start import init_distributed
    from moa_dist.verify.verify import verify

    with init_distributed() as context:
        mesh = make_mesh(config.parallel.expert_parallel)
        report = verify(config, mesh, context.device)
        if mesh.rank == 0:
            print(as_text(config, context, report), flush=True)
        dist.barrier()  # launchers kill all ranks at the first that exits with 1
    return 0 if report.equal else 1


def as_text(config: Config, context: DistContext, report: Report) -> str:
    """Format what was run, a line per comparison, and the verdict."""
    layout = _layout(report.config, context)
    different = [check for check in report.checks if not check.equal]
    verdict = f"equal: {layout} takes the same steps as one process"
    if different:
        named = next((check for check in different if check.where), different[0])
        what = f"{named.what} of {named.where}" if named.where else named.what
        verdict = (
            f"DIFFERENT: on {layout}, {what} is off by {named.deviation:.1e}, "
            f"more than {named.bound:.0e}"
        )
    return "\n".join(
        [
            f"{config.name}, shrunk: {_sizes(report)}",
            f"{layout}, in {report.precision}, against one process in fp64",
            "",
            *(_line(check) for check in report.checks),
            "",
            *_limits(config),
            verdict,
        ]
    )


def _layout(config: Config, context: DistContext) -> str:
    parallel, train = config.parallel, config.train
    ep, exchange = parallel.expert_parallel, parallel.expert_exchange
    words = [
        f"W {context.world_size} = ep {ep} x edp {context.world_size // ep}",
        f"ZeRO {parallel.zero_stage}",
    ]
    if ep > 1:
        words.append(f"attention exchanges {exchange.attention}, FFN {exchange.ffn}")
    if train.recompute:
        words.append("recomputed")
    return ", ".join([*words, f"{context.device.type} with {context.backend}"])


def _sizes(report: Report) -> str:
    model, train = report.config.model, report.config.train
    words = [
        f"{report.num_parameters:,} parameters",
        f"{model.num_layers} layers ({model.num_distinct_layers or model.num_core_layers} distinct"
        f"{' between others' if model.num_core_layers < model.num_layers else ''})",
        f"{train.global_batch} sequences of {report.config.data.sequence_length}",
        f"{1 - report.real_share:.0%} padding",
        f"{report.idle_experts} idle experts",
        f"{report.dropped} assignments dropped",
    ]
    return ", ".join(words)


def _line(check: Check) -> str:
    verdict = "equal" if check.equal else "DIFFERENT"
    bound = f"(bound {check.bound:.0e})" if check.bound else "(exact)"
    where = check.where if check.deviation else ""
    return f"  {check.what:<40}{verdict:<11}{check.deviation:.1e} {bound:<16}{where}".rstrip()


def _limits(config: Config) -> list[str]:
    """Return lines about what the comparison does not cover."""
    model, lines = config.model, []
    if any(router.expert_dropout for router in model.routers().values()):
        lines.append("not compared: expert dropout, which depends on the layout; it was off")
    if model.dropout:
        lines.append("not compared: dropout, which depends on the layout; it was off")
    if config.train.precision == "bf16":
        lines.append(
            "bf16 bounds reveal only wrong factors, as rounding makes some tokens switch experts"
        )
    return lines
