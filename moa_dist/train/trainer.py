"""The training loop, to be read from top to bottom.

    configuration -> mesh -> sharded model -> engine -> stream -> step, step, step

All state of a run is its parameters, its optimizer moments, and how many steps and samples it
has consumed: data order, learning rate and random numbers are functions of these.
"""

from __future__ import annotations

from moa_dist.config.run import Config
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode
from moa_dist.observe.metrics import Observer
from moa_dist.train.startup import open_run


def train(config: Config, observer: Observer, preemption: Preemption) -> ExitCode:
    """Train as configured, from the newest checkpoint if there is one.

    Every rank of the job calls this; `observer` listens on rank 0. Returns PREEMPTED, after
    saving, if `preemption` was requested of any rank, else DONE.
    """
    with open_run(config, observer, preemption) as run:
        while not run.done:
            batches = run.next_batches()
            sync = run.sync(batches)
            if sync.stop:
                break
            result = run.step(batches)
            if result is None:  # rejected: its samples are consumed, but no step was taken
                continue
            run.log(result, sync.digest)
            run.validate()
            run.sample()
            run.save()
        return run.finish()
