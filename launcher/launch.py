"""Train and survive: `python launcher/launch.py --config FILE [key.path=value ...]`.

Starts a rank per GPU of this machine (`--ranks N` on CPUs) by the `deepspeed` launcher, shows
rank 0's output, keeps that of every rank in `runs/NAME/logs/attempt-NN/rank-N.log`, and if the
job fails says why and starts it again from the newest checkpoint. `runs/NAME/attempts.jsonl`
lists all attempts. SIGTERM, SIGUSR1 or Ctrl-C let the job save and end; the same command
continues it.

Exit codes: 0 done, 1 given up after restarts, 2 an error that only you can mend, 3 loss not
finite, 4 checkpoint not written, 75 preempted, 76 given up after losing ranks; see
`moa_dist.errors.ExitCode`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moa_dist.config import load_config
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode, MoaDistError
from moa_dist.launch.local import LocalJob
from moa_dist.launch.supervisor import RestartPolicy, supervise


def main() -> int:
    """Returns the exit status, see `moa_dist.errors.ExitCode`."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks to start; default: one per GPU, or one"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=RestartPolicy.max_restarts,
        metavar="N",
        help="restarts in a row without a new checkpoint before giving up (default %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, str(script), "--config", args.config, *args.overrides]
    try:
        config = load_config(args.config, args.overrides)
    except MoaDistError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER
    try:
        with Preemption(by_keyboard=True) as preemption:
            return supervise(
                config,
                lambda folder: LocalJob(folder, command, args.ranks),
                RestartPolicy(args.max_restarts),
                preemption,
                sys.stdout,
            )
    except OSError as error:  # the job has been ended
        print(f"the run's folder cannot be used: {error}", file=sys.stderr)
        return ExitCode.DEFECT
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
