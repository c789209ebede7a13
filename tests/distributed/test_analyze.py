"""What ranks saved with experts sharded between them is analyzed on one process."""

from functools import partial

import torch

from moa_dist.analyze.analyze import attention_results, observe, router_results
from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.config import Config
from moa_dist.distributed.mesh import make_mesh
from moa_dist.evaluate.trained import load_model
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.models.small import small_config, tokens_of


def config() -> Config:
    return Config.model_validate(
        {
            "name": "sharded",
            "model": small_config("switchhead", "moe", num_layers=4, num_distinct_layers=2),
            "data": {"train": "data", "sequence_length": 7},
            "parallel": {"expert_parallel": 2},
            "train": {"steps": 1, "global_batch": 2, "micro_batch": 1},
        }
    )


def save(folder):
    mesh = make_mesh(2)
    model = build_model(config().model, seed=5, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config(), mesh, torch.device("cpu"))
    checkpointer = Checkpointer(engine.state, config(), folder)
    checkpointer.save(1, 2)
    checkpointer.finish()
    engine.close()


def results(model):
    batches = [Batch(tokens_of(4, seed=seed)) for seed in range(2)]
    seen = observe(model, batches, torch.device("cpu"))
    return router_results(model, seen, 1, str), attention_results(seen)


def test_a_checkpoint_of_two_ranks(pools, tmp_path):
    pools(2).run(save, tmp_path)
    routers, attention = results(load_model(tmp_path))
    assert (routers, attention) == results(build_model(config().model, seed=5).eval())
    assert {router.num_experts for router in routers} == {6, 4}
    assert {router.num_repeats for router in routers} == {2}
