"""A checkpoint of any layout continues in any other: parameters and moments bit for bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.checkpoint.format import checkpoints, read_model
from moa_dist.distributed.mesh import make_mesh
from moa_dist.errors import DataError
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import SEQUENCES, Case


def run_steps(case: Case, folder: Path, *, seed: int, first: int, last: int, save: bool):
    """On every rank: resume `folder` if `first` > 1, take steps first ... last, save.

    Returns the losses and norms, and the state owned by this rank.
    """
    config, batch = case.config(), case.batch()
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh)
    model = build_model(config.model, seed=seed, parallelize=shard)
    engine = Engine(model, config, mesh, torch.device("cpu"))
    checkpointer = Checkpointer(engine.state, config, folder)
    if first > 1:
        assert checkpointer.resume().step == first - 1
    state = {
        (f.parameter, f.state, f.start): f.view.clone()
        for f in engine.state.fragments(owned_only=True)
    }
    trace = []
    for step in range(first, last + 1):
        rows = (torch.arange(mesh.rank, SEQUENCES, mesh.world_size) + step) % SEQUENCES
        micro = [Batch(batch.tokens[r], batch.token_mask[r]) for r in rows.split(case.micro_batch)]
        result = engine.step(micro, lr=1e-2 / step)
        trace.append((result.loss, result.grad_norm))
    if save:
        checkpointer.save(last, last * SEQUENCES)
        checkpointer.finish()
    engine.close()
    return trace, state


ADAM = Case(optimizer="adamw", clip_norm=0.1, precision="fp32")
SAME_LAYOUT = {
    "ZeRO 0, fp64": replace(ADAM, zero_stage=0, precision="fp64"),
    "ZeRO 1": replace(ADAM, zero_stage=1),
    "ZeRO 1, bf16": replace(ADAM, zero_stage=1, precision="bf16"),
    "ZeRO 2, bf16": replace(ADAM, zero_stage=2, precision="bf16"),
    "ZeRO 3": replace(ADAM, zero_stage=3),
    "ZeRO 3, bf16": replace(ADAM, zero_stage=3, precision="bf16"),
    "ZeRO 1, Muon": replace(ADAM, zero_stage=1, optimizer="muon"),
    "ZeRO 3, Muon": replace(ADAM, zero_stage=3, optimizer="muon"),
    "ZeRO 2, momentum": replace(ADAM, zero_stage=2, optimizer="sgd", momentum=0.9),
}


@pytest.mark.parametrize("case", SAME_LAYOUT.values(), ids=SAME_LAYOUT.keys())
def test_same_layout_continues_bit_for_bit(pools, tmp_path, case):
    run = partial(pools(case.world_size).run, run_steps)
    together = run(case, tmp_path / "a", seed=0, first=1, last=4, save=False)
    run(case, tmp_path / "b", seed=0, first=1, last=2, save=True)
    # Another seed: nothing but the checkpoint may bring the values back.
    resumed = run(case, tmp_path / "b", seed=1, first=3, last=4, save=False)
    for (ours, _), (theirs, _) in zip(resumed, together, strict=True):
        assert ours == theirs[2:]


def test_whole_model_on_one_process(pools, tmp_path):
    pools(2).run(run_steps, ADAM, tmp_path, seed=0, first=1, last=1, save=True)
    model, index = read_model(checkpoints(tmp_path)[-1])
    assert index.step == 1
    batch = ADAM.batch()
    inputs, real = batch.tokens[:, :-1], batch.token_mask[:, :-1]
    assert model(inputs, real).logits.isfinite().all()
    initial = build_model(ADAM.config().model)
    pairs = zip(model.parameters(), initial.parameters(), strict=True)
    assert not any(torch.equal(ours, start) for ours, start in pairs)


@pytest.mark.parametrize("damage", ["missing file", "truncated file", "no index", "other shape"])
def test_damage_is_named(pools, tmp_path, damage):
    pools(2).run(run_steps, ADAM, tmp_path, seed=0, first=1, last=1, save=True)
    folder = checkpoints(tmp_path)[-1]
    file = folder / "rank-00001.safetensors"
    if damage == "missing file":
        file.unlink()
    elif damage == "truncated file":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no index":
        file = folder / "checkpoint.json"
        file.unlink()
    else:
        index = (folder / "checkpoint.json").read_text()
        (folder / "checkpoint.json").write_text(
            index.replace('"vocab_size": 31', '"vocab_size": 29')
        )
        file = folder
    with pytest.raises(DataError, match=file.name):
        read_model(folder)
