"""Weights without moments, as from an import, train on in any layout as on one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moa_dist.checkpoint.checkpointer import Checkpointer
from moa_dist.checkpoint.format import MASTER
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import objective
from tests.distributed.layouts import MOA, Case, router, whole
from tests.distributed.test_reshard import LAYOUTS, make_engine, owned_state, take_step
from tests.transfer.runs import make_run, randomize

ROUTER = router(6, 2, "softmax", gate="renormalized", balance={"switch": 0.01})
JETMOE = {
    "norm_placement": "pre",
    "norm": "rmsnorm",
    "num_distinct_layers": None,
    "num_layers": 2,
    "tie_embeddings": True,
    "attention": MOA | {"heads_per_expert": 2, "output_bias": True, "router": ROUTER},
    "ffn": {"kind": "moe", "d_expert": 8, "gated": True, "output_bias": True, "router": ROUTER},
}


def go_on(case: Case, folder: Path):
    """On every rank: resume with moments of another run still there; state, loss of step 1."""
    engine = make_engine(case, seed=99)
    take_step(engine, case, 1)
    resumed = Checkpointer(engine.state, case.config(), folder).resume()
    state, loss = owned_state(engine), take_step(engine, case, 1)
    engine.close()
    return resumed.step, state, loss


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_goes_on_from_given_weights(pools, tmp_path, name):
    case = replace(LAYOUTS[name], model=JETMOE)
    model = build_model(case.config().model)
    randomize(model)
    make_run(tmp_path / "run", model)
    steps, states, losses = zip(
        *pools(case.world_size).run(go_on, case, tmp_path / "run"), strict=True
    )
    assert set(steps) == {0}
    state = whole(list(states), case)
    for parameter, value in model.state_dict().items():
        assert torch.equal(state.pop((parameter, MASTER)), value.flatten()), parameter
    assert len(state) == 2 * len(model.state_dict())
    assert not any(moment.any() for moment in state.values())
    with torch.no_grad():
        total = objective(model, case.batch()).cross_entropy
    assert losses[0] == pytest.approx(total.item() / case.batch().num_targets(), rel=1e-5)
