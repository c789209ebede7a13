"""Every layout's checkpoint continues in every other: state bit for bit, the next loss to 1e-5."""

from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import SEQUENCES, Case, whole

BASE = Case(optimizer="adamw", clip_norm=0.1, precision="fp32")
LAYOUTS = {
    "W 1 ep 1 ZeRO 0": replace(BASE, world_size=1, expert_parallel=1, zero_stage=0),
    "W 2 ep 1 ZeRO 1": replace(BASE, world_size=2, expert_parallel=1, zero_stage=1),
    "W 2 ep 2 ZeRO 2": replace(BASE, world_size=2, expert_parallel=2, zero_stage=2),
    "W 4 ep 2 ZeRO 2": replace(BASE, world_size=4, expert_parallel=2, zero_stage=2),
    "W 4 ep 4 ZeRO 3": replace(BASE, world_size=4, expert_parallel=4, zero_stage=3),
    "W 2 ep 2 ZeRO 2, weights travel": replace(
        BASE, world_size=2, expert_parallel=2, zero_stage=2, exchange="weights"
    ),
}


def make_engine(case: Case, seed: int) -> Engine:
    config = case.config()
    mesh = make_mesh(case.expert_parallel)
    shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    model = build_model(config.model, seed=seed, parallelize=shard)
    return Engine(model, config, mesh, torch.device("cpu"))


def take_step(engine: Engine, case: Case, step: int) -> float:
    batch = case.batch()
    assert batch.token_mask is not None
    ranks = torch.arange(engine.mesh.rank, SEQUENCES, engine.mesh.world_size)
    rows = ((ranks + step) % SEQUENCES).split(case.micro_batch)
    return engine.step(
        [Batch(batch.tokens[r], batch.token_mask[r]) for r in rows], 1e-2 / step
    ).loss


def owned_state(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    return {
        (f.parameter, f.state, f.start): f.view.clone()
        for f in engine.state.fragments(owned_only=True)
    }


def train_and_save(case: Case, seed: int, folder: Path):
    """On every rank: two steps, save; the state then, and the loss of the third step."""
    engine = make_engine(case, seed)
    for step in (1, 2):
        take_step(engine, case, step)
    checkpointer = Checkpointer(engine.state, case.config(), folder)
    checkpointer.save(2, 2 * SEQUENCES)
    state = owned_state(engine)
    loss = take_step(engine, case, 3)  # changes what is being saved, if it is not a copy
    checkpointer.finish()
    engine.close()
    return state, loss


def resume_each(case: Case, folders: dict[str, Path]):
    """On every rank, with one engine: resume from each folder; state and loss as above.

    So each finds the engine as another run has left it, as in going back.
    """
    engine = make_engine(case, seed=99)
    results = {}
    for name, folder in folders.items():
        assert Checkpointer(engine.state, case.config(), folder).resume().step == 2
        results[name] = owned_state(engine), take_step(engine, case, 3)
    engine.close()
    return results


@pytest.fixture(scope="module")
def crossed(pools, tmp_path_factory):
    """What each layout saved, and what each other layout made of it."""
    folder = tmp_path_factory.mktemp("reshard")
    folders = {name: folder / str(i) for i, name in enumerate(LAYOUTS)}
    saved, loaded = {}, {}
    for seed, (name, case) in enumerate(LAYOUTS.items()):  # every source trains other weights
        ranks = pools(case.world_size).run(train_and_save, case, seed, folders[name])
        saved[name] = whole([state for state, _ in ranks], BASE), ranks[0][1]
    for name, case in LAYOUTS.items():
        others = {source: folder for source, folder in folders.items() if source != name}
        ranks = pools(case.world_size).run(resume_each, case, others)
        for source in others:
            state = whole([rank[source][0] for rank in ranks], BASE)
            loaded[source, name] = state, ranks[0][source][1]
    return saved, loaded


@pytest.mark.parametrize(
    ("source", "target"), list(permutations(LAYOUTS, 2)), ids=lambda name: name.replace(" ", "")
)
def test_any_layout_continues_any_other(crossed, source, target):
    saved, loaded = crossed
    (expected, expected_loss), (found, loss) = saved[source], loaded[source, target]
    assert {kind for _, kind in expected} == {"master", "exp_avg", "exp_avg_sq"}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert loss == pytest.approx(expected_loss, rel=1e-5)
