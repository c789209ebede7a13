"""Host time of recomputation: `python -m tests.benchmarks.recompute`.

A MoEUT of the shipped depth and tiny widths, where next to all time is Python and dispatch: blocks
that keep their choices of experts against torch's plain checkpoint of the same blocks. The ratio
should be at most 1.1.
"""

import time
from statistics import median
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

from moa_dist.config import load_config
from moa_dist.models import stack
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch, objective

TINY = ("d_model=16", "attention.d_head=8", "ffn.d_expert=8", "vocab_size=64")
ROUNDS = 9


def plain(module, repeats, call, *args):
    """Checkpoint a call of a module without keeping what its routers chose."""

    def run(*args):
        with repeats.summing():
            return call(*args)

    return checkpoint(run, *args, use_reentrant=False)


def main() -> None:
    """Measure both in turn, so that a busy machine slows both alike."""
    torch.set_num_threads(1)
    model = load_config("configs/moeut/244m.yaml", [f"model.{size}" for size in TINY]).model
    batch = Batch(torch.randint(64, (1, 9)))
    functions = {"plain checkpoint": plain, "choices kept": stack.recomputed}
    models = {name: build_model(model, recompute=True).train() for name in functions}
    seconds = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            with mock.patch.object(stack, "recomputed", function):
                start = time.thread_time()
                objective(models[name], batch).loss(8.0).backward()
                seconds[name].append(time.thread_time() - start)
    first, second = (median(values) for values in seconds.values())
    print(f"plain checkpoint {first * 1e3:.0f} ms, choices kept {second * 1e3:.0f} ms")
    print(f"ratio {second / first:.2f}")


if __name__ == "__main__":
    main()
