"""How long a save holds up training, with and without `checkpoint.asynchronous`.

    python -m tests.benchmarks.saving [--folder FOLDER] [--rounds N]

Two gloo ranks, a model of more than 50 M parameters in fp32 with AdamW (600 MB a checkpoint),
ZeRO 1. A round saves once in each mode; training is blocked while `save` runs. In the asynchronous
mode the next save finds the last one written, as it does in runs that save every few minutes.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moa_dist.config.run import Config
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from tests.distributed.pool import Pool

WORLD_SIZE, LENGTH = 2, 64
ROUTER = {"num_experts": 16, "top_k": 2, "score": "sigmoid"}
CONFIG = {
    "name": "saving",
    "model": {
        "vocab_size": 8000,
        "d_model": 512,
        "num_layers": 8,
        "norm_placement": "peri",
        "attention": {
            "kind": "switchhead",
            "num_heads": 4,
            "d_head": 64,
            "router": ROUTER | {"num_experts": 4},
        },
        "ffn": {"kind": "moe", "d_expert": 256, "router": ROUTER},
    },
    "data": {"train": "none", "sequence_length": LENGTH},
    "parallel": {"expert_parallel": 2, "zero_stage": 1},
    "train": {"steps": 1, "global_batch": 2, "micro_batch": 1},
    "checkpoint": {"keep_last": 1},
}


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds that `save` held up training, by mode, and of a step."""
    from moa_dist.train.checkpoint import Checkpointer
    from moa_dist.train.engine import Engine

    config = Config.model_validate(CONFIG)
    waiting = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})}
    )
    mesh = make_mesh(config.parallel.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"))
    modes = {
        "asynchronous": Checkpointer(engine, config, folder / "asynchronous"),
        "waiting": Checkpointer(engine, waiting, folder / "waiting"),
    }
    seconds: dict[str, list[float]] = {
        name: [] for name in ("step", "asynchronous", "step beside it", "waiting")
    }
    for step in range(1, rounds + 2):
        batch = Batch(torch.randint(8000, (1, LENGTH + 1)))
        train = partial(engine.step, [batch], 1e-4)
        seconds["step"].append(timed(train))
        for mode, checkpointer in modes.items():
            seconds[mode].append(timed(partial(checkpointer.save, step, 2 * step)))
            if mode == "asynchronous":
                seconds["step beside it"].append(timed(train))
            checkpointer.finish()
    engine.close()
    return {name: values[1:] for name, values in seconds.items()}  # the first round allocates


def timed(work) -> float:
    dist.barrier()
    start = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (5)")
    args = parser.parse_args()
    size = sum(p.numel() for p in build_model(Config.model_validate(CONFIG).model).parameters())
    assert size >= 50_000_000
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        pool = Pool(WORLD_SIZE)
        seconds = pool.run(measure, Path(folder), args.rounds)[0]
        pool.close()
    print(f"{size / 1e6:.1f} M parameters, fp32, AdamW, W {WORLD_SIZE}, {args.rounds} saves each")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<15}{median:8.3f} s  ({min(values):.3f} to {max(values):.3f})")
    ratio = statistics.median(seconds["asynchronous"]) / statistics.median(seconds["waiting"])
    print(f"training is blocked for {ratio:.3f} of the time that writing takes")


if __name__ == "__main__":
    main()
