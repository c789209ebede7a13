"""Write a job for a cluster's scheduler: `python launcher/job.py slurm|kubernetes ...`.

    python launcher/job.py slurm --config FILE --nodes 8 --gpus-per-node 8 --time 2-00:00:00
    sbatch runs/NAME/job.sbatch

    python launcher/job.py kubernetes --config FILE --nodes 8 --gpus-per-node 8 \\
        --image IMAGE --volume data:/app/data --volume runs:/app/runs | kubectl apply -f -

Either job starts one `launcher/launch.py` per node and continues after a preemption. The
configuration is first checked for the number of ranks that the job will have.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.config import Config, find_layout_problems, load_config
from moa_dist.config.run import run_folder
from moa_dist.errors import ConfigError, ExitCode, MoaDistError
from moa_dist.launch.kubernetes import KubernetesJob, manifest
from moa_dist.launch.slurm import SCRIPT_FILE, SlurmJob, sbatch_script


def main(argv: list[str]) -> int:
    """Write the job; returns the exit status: 0, or 2 for an error that the user can fix."""
    assert __doc__ is not None
    chooser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"slurm": _add_slurm, "kubernetes": _add_kubernetes}
    chooser.add_argument("kind", choices=kinds, help="scheduler; KIND --help lists its options")
    kind = chooser.parse_args(argv[:1]).kind
    parser = argparse.ArgumentParser(prog=f"{chooser.prog} {kind}")
    kinds[kind](parser)
    args = parser.parse_intermixed_args(argv[1:])
    try:
        config = load_config(args.config, args.overrides)
        args.ranks = args.gpus_per_node or args.ranks_per_node
        problems = find_layout_problems(config, args.nodes * args.ranks)
        if problems:
            raise ConfigError(problems, f"{config.name} on {args.nodes} x {args.ranks} ranks")
        args.write(config, args)
    except (MoaDistError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.USER
    return ExitCode.DONE


def _add_common(parser: argparse.ArgumentParser) -> None:
    count = between(int, 1)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--nodes", required=True, type=count, metavar="N", help="number of nodes")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument(
        "--gpus-per-node", type=count, metavar="G", help="GPUs per node, one rank on each"
    )
    ranks.add_argument(
        "--ranks-per-node", type=count, metavar="R", help="ranks per node, without GPUs"
    )
    parser.add_argument(
        "--grace",
        type=between(int, 30, 65535),
        default=300,
        metavar="SECONDS",
        help="time to finish a step and save before the job is killed (default %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--time", metavar="LIMIT", help="time limit, such as 2-00:00:00")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="additional option of the job, repeatable, such as --sbatch=--qos=high",
    )
    parser.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="OPTION",
        help="additional option of the step, repeatable, such as --srun=--container-image=FILE",
    )
    parser.add_argument(
        "--python",
        default=shlex.quote(sys.executable),
        metavar="COMMAND",
        help="Python on the nodes, such as 'apptainer exec --nv FILE python' (default: this one)",
    )
    parser.set_defaults(write=_write_slurm)


def _write_slurm(config: Config, args: argparse.Namespace) -> None:
    folder = Path.cwd()
    job = SlurmJob(
        nodes=args.nodes,
        ranks_per_node=args.ranks,
        gpus=args.gpus_per_node is not None,
        grace_s=args.grace,
        time=args.time,
        partition=args.partition,
        account=args.account,
        sbatch=tuple(args.sbatch),
        srun=tuple(args.srun),
    )
    launcher = Path(__file__).resolve().with_name("launch.py")
    launch = [*shlex.split(args.python), str(launcher), "--config", args.config, *args.overrides]
    script = sbatch_script(config, job, folder, launch)
    path = run_folder(config) / SCRIPT_FILE
    (path.parent / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not create folders
    path.write_text(script)
    print(f"sbatch {shlex.quote(str(path))}")


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--image", required=True, help="image built from docker/Dockerfile")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:FOLDER",
        help="persistent volume claim and where to mount it, repeatable, such as runs:/app/runs",
    )
    parser.add_argument("--cpu", metavar="QUANTITY", help="CPUs per pod")
    parser.add_argument("--memory", metavar="QUANTITY", help="memory per pod, such as 64Gi")
    parser.add_argument(
        "--shared-memory",
        default=KubernetesJob.shared_memory,
        metavar="QUANTITY",
        help="size limit of /dev/shm (default %(default)s)",
    )
    parser.set_defaults(write=_write_kubernetes)


def _write_kubernetes(config: Config, args: argparse.Namespace) -> None:
    volumes = [volume.partition(":")[::2] for volume in args.volume]
    job = KubernetesJob(
        nodes=args.nodes,
        ranks_per_node=args.ranks,
        gpus=args.gpus_per_node is not None,
        image=args.image,
        volumes=tuple(volumes),
        grace_s=args.grace,
        cpu=args.cpu,
        memory=args.memory,
        shared_memory=args.shared_memory,
    )
    sys.stdout.write(manifest(config, job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
