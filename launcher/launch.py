"""Train with automatic restarts: `python launcher/launch.py --config FILE [key.path=value ...]`.

Starts one rank per GPU of this machine, or per GPU that CUDA_VISIBLE_DEVICES lists (`--ranks N` on
CPUs), through the `deepspeed` launcher, shows rank 0's output, and logs that of every rank to
`runs/NAME/logs/attempt-NN/rank-N.log`. If the job fails, it says why and restarts the job from the
newest checkpoint. `runs/NAME/attempts.jsonl` lists all attempts. On SIGTERM, SIGUSR1 or Ctrl-C the
job saves and stops; the same command continues it.

`--hostfile FILE` starts ranks on all its hosts through pdsh and ssh. Without ssh, start the same
command once on every node with --nodes, --node-rank and --master-addr, and the same random text in
MOA_DIST_JOB_SECRET; node 0 leads, and all nodes exit with the same code. Both ways first check all
hosts and report everything that is wrong. All hosts must share the run's folder.

Exit codes: 0 done, 1 gave up after restarts, 2 configuration or data error, 3 loss not finite,
4 checkpoint not written, 75 preempted, 76 gave up after losing ranks; see
`moa_dist.errors.ExitCode`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
from contextlib import closing
from pathlib import Path

from moa_dist.cli.arguments import between
from moa_dist.config import Config, load_config
from moa_dist.distributed.gpus import num_gpus
from moa_dist.distributed.network import host_name
from moa_dist.distributed.preemption import Preemption
from moa_dist.distributed.process import SUPERVISOR_VARIABLE
from moa_dist.doctor.environment import DEFAULT_PORT
from moa_dist.errors import ExitCode, MoaDistError, refused_paths_named
from moa_dist.launch.handshake import new_nonce, take_secret
from moa_dist.launch.hostfile import read_hostfile
from moa_dist.launch.leader import Node, NodesLauncher
from moa_dist.launch.local import LocalLauncher
from moa_dist.launch.preflight import Wanted
from moa_dist.launch.retry import HOST_WAIT_S, Waiting
from moa_dist.launch.ssh import given_arguments
from moa_dist.launch.ssh_launcher import HostsLauncher
from moa_dist.launch.supervisor import RestartPolicy, supervise
from moa_dist.launch.visible_devices import ranks_on_visible_devices
from moa_dist.launch.worker_node import follow


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--ranks",
        type=between(int, 1),
        metavar="N",
        help="ranks to start on this machine; default: one per GPU in CUDA_VISIBLE_DEVICES or, "
        "if that is unset, per GPU; one without GPUs",
    )
    parser.add_argument(
        "--max-restarts",
        type=between(int, 0),
        default=RestartPolicy.max_restarts,
        metavar="N",
        help="consecutive restarts without a new checkpoint before giving up (default %(default)s)",
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="hosts, one per line: `NAME slots=RANKS`"
    )
    parser.add_argument(
        "--ssh-args",
        default=given_arguments(),
        metavar="ARGS",
        help='arguments for ssh to the hosts, such as "-p 2222"; default: PDSH_SSH_ARGS_APPEND',
    )
    parser.add_argument(
        "--nodes",
        type=between(int, 1),
        metavar="N",
        help="without ssh: number of nodes on which this command is started",
    )
    parser.add_argument(
        "--node-rank", type=between(int, 0), metavar="R", help="number of this node, from 0"
    )
    parser.add_argument("--master-addr", metavar="A", help="address of node 0 for the others")
    parser.add_argument(
        "--master-port",
        type=between(int, 1, 65535),
        metavar="P",
        help=f"port on node 0; default: {DEFAULT_PORT}, or with --hostfile another if it is in use",
    )
    parser.add_argument(
        "--host-wait",
        type=between(float, 0.0),
        default=HOST_WAIT_S,
        metavar="SECONDS",
        help="longest wait for a host that is lost, or a node that has not started yet "
        "(default %(default)g)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    for is_wrong, message in _conflicts(args):
        if is_wrong:
            parser.error(message)
    return args


def _conflicts(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """List the rules about combinations of arguments, and whether each one is broken."""
    is_node = args.nodes is not None or args.node_rank is not None
    with_ssh = args.hostfile is not None
    complete = None not in (args.nodes, args.node_rank, args.master_addr)
    return [
        (
            with_ssh and is_node,
            "--hostfile cannot be combined with --nodes: it reaches all nodes through ssh",
        ),
        (
            with_ssh and args.ranks is not None,
            "--hostfile cannot be combined with --ranks: its slots are the ranks of each host",
        ),
        (is_node and not complete, "--nodes, --node-rank and --master-addr must be used together"),
        (
            complete and not args.node_rank < args.nodes,
            f"--node-rank is {args.node_rank}, but must be less than --nodes ({args.nodes})",
        ),
        (
            not (with_ssh or is_node) and (args.master_addr or args.master_port) is not None,
            "--master-addr and --master-port require --hostfile or --nodes",
        ),
    ]


def main() -> int:
    """Run the launcher; returns the exit status, see `moa_dist.errors.ExitCode`."""
    args = parse()
    try:
        with refused_paths_named():
            config = load_config(args.config, args.overrides)
            with Preemption(second_interrupt=signal.default_int_handler) as preemption:
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
    """Supervise the job on this machine, on the hosts of a hostfile, or as one of several nodes."""
    script = Path(__file__).absolute().with_name("train.py")
    command = [sys.executable, str(script), "--config", args.config, *args.overrides]
    os.environ[SUPERVISOR_VARIABLE] = f"{os.getpid()}@{host_name()}/{secrets.token_hex(4)}"
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
    ranks = ranks_on_visible_devices(os.environ, args.ranks, num_gpus())
    if not is_node:
        local = LocalLauncher(command, ranks)
        return supervise(config, local, policy, preemption, sys.stdout)
    port = args.master_port or DEFAULT_PORT
    secret = take_secret(os.environ) if args.nodes > 1 else new_nonce()
    node = Node(args.nodes, args.node_rank, args.master_addr, port, ranks, host_name(), secret)
    if node.rank:
        return follow(node, config, command, waiting)
    with NodesLauncher(node, config, command, wanted, waiting) as leader:
        leader.ends_with = supervise(config, leader, policy, preemption, sys.stdout)
    return leader.ends_with


if __name__ == "__main__":
    sys.exit(main())
