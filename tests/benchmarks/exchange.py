"""What travelling costs: tokens or weights, overlapped or not, against experts that are all here.

    python -m tests.benchmarks.exchange [--rounds N]

Two gloo ranks with one thread each, forward and backward of a MoEUT in fp32. A round takes one
pass in each mode, in turn; ratios are to experts that are whole on every rank, which sends nothing.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist

from moa_dist.config import load_config
from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from tests.config.test_shipped_configs import CONFIGS
from tests.distributed.pool import Pool

SEQUENCES, LENGTH = 8, 256


def measure(rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of a pass, by mode."""
    config = load_config(CONFIGS / "small/moeut.yaml").model
    whole, shared = make_mesh(1), make_mesh(2)
    models = {"experts here": build_model(config, parallelize=partial(shard_experts, mesh=whole))}
    for kind in ("tokens", "weights"):
        exchange = ExpertExchangeConfig.model_validate({"attention": kind, "ffn": kind})
        for overlap in (False, True):
            shard = partial(shard_experts, mesh=shared, exchange=exchange, overlap=overlap)
            name = f"{kind}, {'overlapped' if overlap else 'blocking'}"
            models[name] = build_model(config, parallelize=shard)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, LENGTH))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            dist.barrier()
            start = time.monotonic()
            output = model(tokens)
            (output.logits.square().mean() + sum(output.auxiliary.values())).backward()
            dist.barrier()
            seconds[name].append(time.monotonic() - start)
            model.zero_grad()
    return {name: values[1:] for name, values in seconds.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="passes of each kind (9)")
    args = parser.parse_args()
    pool = Pool(2)
    seconds = pool.run(measure, args.rounds)[0]
    pool.close()
    base = seconds["experts here"]
    print(f"configs/small/moeut.yaml, {SEQUENCES} x {LENGTH} tokens a rank, {args.rounds} rounds")
    for name, values in seconds.items():
        ratios = [value / of_round for value, of_round in zip(values, base, strict=True)]
        print(
            f"{name:<22}{statistics.median(values):7.3f} s   {statistics.median(ratios):5.2f}x  "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
