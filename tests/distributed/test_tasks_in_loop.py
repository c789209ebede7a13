"""Zero-shot tasks of a sharded model: the scores of one process, whatever the number of batches."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from moa_dist.config.run import EvaluationConfig
from moa_dist.data.tokenizer import TOKENIZER_FILE, train_tokenizer
from moa_dist.distributed.mesh import make_mesh
from moa_dist.evaluate.zero_shot import task_evaluation
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import Case

TEXTS = ["the cat sat on a mat", "a dog ran", "the dog and the cat ran over the hill", "a", "on"]


@pytest.fixture
def config_of(tmp_path):
    """The configuration of a case, with data and a task of five texts."""
    tokenizer = train_tokenizer(TEXTS, 270)
    data = tmp_path / "data"
    data.mkdir()
    (data / TOKENIZER_FILE).write_text(tokenizer.to_json())
    lines = (json.dumps({"text": f"{text} hill"}) for text in TEXTS)
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines))
    return partial(with_tasks, folder=tmp_path)


def with_tasks(case: Case, folder: Path):
    config = case.config()
    tasks = EvaluationConfig(tasks=(f"lambada={folder / 'lambada.jsonl'}",))
    path = str(folder / "data")
    data = config.data.model_copy(update={"train": path, "valid": path})
    return config.model_copy(update={"data": data, "evaluation": tasks})


def on_rank(case: Case, config) -> dict[str, float]:
    """Runs on every rank: the tasks of a model in this layout."""
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    engine = Engine(build_model(config.model, parallelize=shard), config, mesh, torch.device("cpu"))
    results = task_evaluation(config).run(engine.deepspeed)
    assert engine.deepspeed.training
    engine.close()
    return results


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_scores_are_those_of_one_process(pools, config_of, exchange, zero_stage):
    """Five texts, two of which share a batch: some rank has none in the last round."""
    case = Case(
        world_size=3,
        expert_parallel=3,
        zero_stage=zero_stage,
        precision="fp32",
        exchange=exchange,
        sequences=6,
        micro_batch=1,
        model={"vocab_size": 270},
    )
    config = config_of(case)
    results = pools(3).run(on_rank, case, config)
    assert results[0] == results[1] == results[2]
    alone = task_evaluation(config).run(build_model(config.model))
    assert results[0] == pytest.approx(alone, rel=1e-4)
    assert alone["lambada/perplexity"] > 0
