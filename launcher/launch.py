"""Train and survive: `python launcher/launch.py --config FILE [key.path=value ...]`.

Starts a rank per GPU of this machine (`--ranks N` on CPUs) by the `deepspeed` launcher, shows
rank 0's output, keeps that of every rank in `runs/NAME/logs/attempt-NN/rank-N.log`, and if the
job fails says why and starts it again from the newest checkpoint. `runs/NAME/attempts.jsonl`
lists all attempts. SIGTERM, SIGUSR1 or Ctrl-C let the job save and end; the same command
continues it.

`--hostfile FILE` starts ranks on all its hosts, by pdsh and ssh. Without ssh, the same command
is started once on every node, with --nodes, --node-rank and --master-addr; node 0 leads, and all
end with the same exit code. Both check all hosts first and say everything that is wrong. The
run's folder must be shared by all hosts.

Exit codes: 0 done, 1 given up after restarts, 2 an error that only you can mend, 3 loss not
finite, 4 checkpoint not written, 75 preempted, 76 given up after losing ranks; see
`moa_dist.errors.ExitCode`.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.config import Config, load_config
from moa_dist.distributed.network import host_name
from moa_dist.distributed.preemption import Preemption
from moa_dist.doctor.environment import DEFAULT_PORT
from moa_dist.errors import ExitCode, MoaDistError
from moa_dist.launch.hostfile import read_hostfile
from moa_dist.launch.leader import Node, NodesLauncher
from moa_dist.launch.local import LocalLauncher
from moa_dist.launch.preflight import Wanted
from moa_dist.launch.retry import HOST_WAIT_S, Waiting
from moa_dist.launch.ssh import given_arguments
from moa_dist.launch.ssh_launcher import HostsLauncher
from moa_dist.launch.supervisor import RestartPolicy, supervise
from moa_dist.launch.worker_node import follow


def parse() -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--ranks",
        type=between(int, 1),
        metavar="N",
        help="ranks to start on this machine; default: one per GPU, or one",
    )
    parser.add_argument(
        "--max-restarts",
        type=between(int, 0),
        default=RestartPolicy.max_restarts,
        metavar="N",
        help="restarts in a row without a new checkpoint before giving up (default %(default)s)",
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines `NAME slots=RANKS`")
    parser.add_argument(
        "--ssh-args",
        default=given_arguments(),
        metavar="ARGS",
        help='for ssh to them, such as "-p 2222"; default: PDSH_SSH_ARGS_APPEND',
    )
    parser.add_argument(
        "--nodes",
        type=between(int, 1),
        metavar="N",
        help="without ssh: this command is started on N nodes, by Slurm or Kubernetes",
    )
    parser.add_argument(
        "--node-rank", type=between(int, 0), metavar="R", help="which of them this one is"
    )
    parser.add_argument("--master-addr", metavar="A", help="address of node 0 for the others")
    parser.add_argument(
        "--master-port",
        type=between(int, 1, 65535),
        metavar="P",
        help=f"port on node 0; default: {DEFAULT_PORT}, with --hostfile another if that is taken",
    )
    parser.add_argument(
        "--host-wait",
        type=between(float, 0.0),
        default=HOST_WAIT_S,
        metavar="SECONDS",
        help="longest wait for a host that is lost, or a node that is not there yet "
        "(default %(default)g)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    for wrong, words in _misfits(args):
        if wrong:
            parser.error(words)
    return args


def _misfits(args: argparse.Namespace) -> list[tuple[bool, str]]:
    is_node = args.nodes is not None or args.node_rank is not None
    with_ssh = args.hostfile is not None
    complete = None not in (args.nodes, args.node_rank, args.master_addr)
    return [
        (with_ssh and is_node, "--hostfile reaches all nodes by ssh: leave out --nodes"),
        (
            with_ssh and args.ranks is not None,
            "the hostfile says how many ranks: leave out --ranks",
        ),
        (is_node and not complete, "a node needs --nodes, --node-rank and --master-addr"),
        (
            complete and not args.node_rank < args.nodes,
            f"--node-rank {args.node_rank}: the {args.nodes} nodes count from 0",
        ),
        (
            not (with_ssh or is_node) and (args.master_addr or args.master_port) is not None,
            "--master-addr and --master-port go with --hostfile or --nodes",
        ),
    ]


def main() -> int:
    """Returns the exit status, see `moa_dist.errors.ExitCode`."""
    args = parse()
    try:
        config = load_config(args.config, args.overrides)
        with Preemption(by_keyboard=True) as preemption:
            return launch(args, config, preemption)
    except MoaDistError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER
    except OSError as error:  # the job has been ended
        print(f"the run's folder cannot be used: {error}", file=sys.stderr)
        return ExitCode.DEFECT
    except KeyboardInterrupt:
        return 130


def launch(args: argparse.Namespace, config: Config, preemption: Preemption) -> ExitCode:
    """Supervise the job in the way that the arguments ask for."""
    script = Path(__file__).absolute().with_name("train.py")
    command = [sys.executable, str(script), "--config", args.config, *args.overrides]
    policy = RestartPolicy(args.max_restarts)
    wanted = Wanted(
        config,
        args.config,
        args.overrides,
        args.master_addr,
        args.master_port or DEFAULT_PORT,
        may_pick_port=args.master_port is None,
    )
    is_node = args.nodes is not None
    waiting = Waiting(args.host_wait, preemption, sys.stdout, from_the_start=is_node)
    if args.hostfile is not None:
        hosts = read_hostfile(args.hostfile)
        with closing(HostsLauncher(hosts, command, wanted, waiting, args.ssh_args)) as launcher:
            return supervise(config, launcher, policy, preemption, sys.stdout)
    if not is_node:
        local = LocalLauncher(command, args.ranks)
        return supervise(config, local, policy, preemption, sys.stdout)
    port = args.master_port or DEFAULT_PORT
    node = Node(args.nodes, args.node_rank, args.master_addr, port, args.ranks, host_name())
    if node.rank:
        return follow(node, config, command, waiting)
    with NodesLauncher(node, config, command, wanted, waiting) as leader:
        leader.ends_with = supervise(config, leader, policy, preemption, sys.stdout)
    return leader.ends_with


if __name__ == "__main__":
    sys.exit(main())
