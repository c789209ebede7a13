"""Samples of a sharded model are those of one process, however unevenly prompts are spread."""

from functools import partial
from pathlib import Path

import pytest
import torch

from moa_dist.config.run import EvaluationConfig, SamplesConfig
from moa_dist.data.tokenizer import TOKENIZER_FILE, train_tokenizer
from moa_dist.distributed.mesh import make_mesh
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.evaluate.samples import samples_of
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import Case, router

PROMPTS = ("the cat", "", "the dog and the cat ran over")
NEW_TOKENS, VOCABULARY = 14, 270
FFN = {"kind": "moe", "d_expert": 8}
DROPLESS = {"ffn": FFN | {"router": router(5, 2)}}
CAPACITY = {"ffn": FFN | {"router": router(7, 2, capacity={"factor": 0.5}, group_sequences=2)}}


@pytest.fixture
def config_of(tmp_path):
    """The configuration of a case, with three prompts."""
    tokenizer = train_tokenizer(["the cat sat on a mat", "the dog ran over the hill"], VOCABULARY)
    (tmp_path / TOKENIZER_FILE).write_text(tokenizer.to_json())
    return partial(with_samples, folder=tmp_path)


def with_samples(case: Case, folder: Path):
    config = case.config()
    samples = SamplesConfig(prompts=PROMPTS, tokens=NEW_TOKENS, temperature=1.5, seed=3)
    data = config.data.model_copy(update={"train": str(folder)})
    evaluation = EvaluationConfig(samples=samples)
    return config.model_copy(update={"data": data, "evaluation": evaluation})


def on_rank(case: Case, config) -> list[str]:
    """Runs on every rank: the samples of a model in this layout, twice."""
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    engine = Engine(build_model(config.model, parallelize=shard), config, mesh, torch.device("cpu"))
    state = torch.get_rng_state()
    first = samples_of(config).run(engine.deepspeed)
    assert engine.deepspeed.training
    assert torch.equal(torch.get_rng_state(), state), "training goes on with its random numbers"
    assert samples_of(config).run(engine.deepspeed) == first
    engine.close()
    return first


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("model", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
def test_texts_are_those_of_one_process(pools, config_of, exchange, zero_stage, model):
    """Three prompts, so that one of two ranks has nothing to continue in its second row."""
    case = Case(
        world_size=2,
        expert_parallel=2,
        zero_stage=zero_stage,
        exchange=exchange,
        documents=model is DROPLESS,
        model={"vocab_size": VOCABULARY} | model,
    )
    config = config_of(case)
    results = pools(2).run(on_rank, case, config)
    alone = build_model(config.model).double()
    assert results[0] == results[1] == samples_of(config).run(alone)
    assert len(set(results[0])) == len(PROMPTS)


def test_without_a_capacity_they_are_those_of_the_command(config_of):
    """Longer than the model's context, which is then cut in the same way."""
    config = config_of(Case(model={"vocab_size": VOCABULARY} | DROPLESS))
    model, samples = build_model(config.model).double(), samples_of(config)
    prompts = samples.tokenizer.encode_batch(PROMPTS)
    assert len(prompts[-1]) + NEW_TOKENS > config.data.sequence_length
    drawn = generate(
        model.eval(),
        prompts,
        Sampling(temperature=1.5, top_p=config.evaluation.samples.top_p),
        max_new_tokens=NEW_TOKENS,
        seed=3,
        end_of_document=samples.tokenizer.end_of_document,
        max_length=config.data.sequence_length,
    )
    texts = [""] * len(prompts)
    for prompt, piece in stream_text(samples.tokenizer, drawn, prompts):
        texts[prompt] += piece
    assert samples.run(model) == texts


def test_a_text_that_ends_is_read_on_but_not_continued(config_of):
    config = config_of(Case(model={"vocab_size": VOCABULARY} | DROPLESS))
    model, samples = build_model(config.model).double(), samples_of(config)
    end = samples.tokenizer.end_of_document
    with torch.no_grad():
        model.head.bias[end] = 100.0
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert samples.run(model) == [""] * len(PROMPTS)
    assert len(forwards) == NEW_TOKENS
