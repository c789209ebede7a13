"""A run that starts from the weights of another: in any layout, and only if they fit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.format import MASTER, checkpoints, read_model
from moa_dist.config.run import InitConfig
from moa_dist.data.tokenizer import TOKENIZER_FILE, train_tokenizer
from moa_dist.distributed.mesh import make_mesh
from moa_dist.evaluate.export import export
from moa_dist.models.language_model import build_model
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from moa_dist.train.start_from import load_weights
from tests.distributed.layouts import Case, whole
from tests.distributed.test_checkpoint import ADAM, run_steps


@pytest.fixture
def saved(pools, tmp_path) -> Path:
    """A checkpoint of one step."""
    folder = tmp_path / "runs/first"
    pools(2).run(run_steps, ADAM, folder, seed=0, first=1, last=1, save=True)
    (folder / TOKENIZER_FILE).write_text(train_tokenizer(["a"], 257).to_json())
    return checkpoints(folder)[-1]


def started(case: Case, init: dict) -> tuple[dict, list[str]]:
    """Runs on every rank: this rank's state before the first step, and what is reported."""
    config = case.config().model_copy(update={"init": InitConfig(**init)})
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh)
    model = build_model(config.model, seed=7, parallelize=shard)
    engine = Engine(model, config, mesh, torch.device("cpu"))
    try:
        notes = load_weights(engine.state, config)
        assert engine.state.num_updates() == 0
        fragments = engine.state.fragments(owned_only=True)
        return {(f.parameter, f.state, f.start): f.view.clone() for f in fragments}, notes
    finally:
        engine.close()


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("form", ["checkpoint", "run", "export"])
def test_weights_of_another_layout(pools, saved, tmp_path, form, zero_stage):
    path = {"checkpoint": saved, "run": saved.parent, "export": tmp_path / "out"}[form]
    if form == "export":
        export(saved, path)
    case = replace(ADAM, world_size=3, expert_parallel=3, zero_stage=zero_stage)
    results = pools(3).run(started, case, {"weights": str(path)})
    model, _ = read_model(saved)
    ours = whole([state for state, _ in results], case)
    for name, value in model.state_dict().items():
        assert torch.equal(ours[name, MASTER], value.flatten()), name


def test_what_differs_must_be_named(pools, saved):
    case = replace(ADAM, model={"ffn": {"kind": "dense", "d_ff": 24}})
    run = pools(2).run
    start = {"weights": str(saved)}
    with pytest.raises(AssertionError, match=r"DataError.*init\.new"):
        run(started, case, start)
    with pytest.raises(AssertionError, match=r"DataError.*init\.unused"):
        run(started, case, start | {"new": ["stack.layers.*.ffn.*"]})
    with pytest.raises(AssertionError, match=r"DataError.*init\.new.*no parameter"):
        run(started, case, start | {"new": ["*.ffn.*", "nothing"], "unused": ["*.ffn*"]})

    results = run(started, case, start | {"new": ["*.ffn.*"], "unused": ["*.ffn*"]})
    ours = whole([state for state, _ in results], case)
    theirs, initial = read_model(saved)[0].state_dict(), build_model(case.config().model, seed=7)
    for name, value in initial.state_dict().items():
        expected = value if ".ffn." in name else theirs[name]
        assert torch.equal(ours[name, MASTER], expected.flatten()), name
    assert any("ffn" in note for note in results[0][1])
