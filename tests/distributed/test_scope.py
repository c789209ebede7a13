"""Which tokens balance losses compare: the groups of `balance.scope`, on one rank and on many.

Every rank has data of its own, some of it padding.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moa_dist.distributed.mesh import make_mesh
from moa_dist.evaluate.perplexity import perplexity
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.sharding import shard_experts
from moa_dist.train.engine import Engine
from tests.distributed.layouts import (
    SEQUENCES,
    Case,
    assert_equal,
    balanced,
    distributed,
    one_process,
)

FP64 = 1e-9

ALL_LOSSES = {"switch": 0.1, "z_loss": 0.01, "entropy": 0.1, "mutual_information": 0.1}
GLOBAL = Case(model=balanced(scope="global_batch", **ALL_LOSSES), skewed=True, steps=2)
POOLED = {
    "W 1": replace(GLOBAL, world_size=1, expert_parallel=1, micro_batch=8),
    "W 2 ep 1": replace(GLOBAL, expert_parallel=1, micro_batch=4),
    "W 2 ep 2": replace(GLOBAL, micro_batch=4),
    "W 4 ep 2, recomputed": replace(GLOBAL, world_size=4, recompute=True),
    "W 4 ep 4, weights travel": replace(
        GLOBAL, world_size=4, expert_parallel=4, exchange="weights"
    ),
}


@pytest.mark.parametrize("case", POOLED.values(), ids=POOLED.keys())
def test_global_batch_is_one_group_in_any_layout(pools, case):
    """SGD at rate 1, not clipped: the step is the gradient of every parameter."""
    reference = one_process(case)
    per_sequence = one_process(replace(case, model=balanced(**ALL_LOSSES)))
    for name, value in reference.aux_losses.items():  # z has no interaction of tokens but padding
        assert abs(value - per_sequence.aux_losses[name]) > 1e-6 * abs(value)
    assert_equal(distributed(pools, case), reference, FP64)


def test_global_batch_at_zero_2(pools):
    case = replace(GLOBAL, micro_batch=4, zero_stage=2, precision="fp32", steps=1)
    assert_equal(distributed(pools, case), one_process(case), 1e-5)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_micro_batch_is_one_group(pools, micro_batch):
    """As if `group_sequences` were the micro-batch; so the loss changes with it."""
    case = Case(micro_batch=micro_batch, model=balanced(scope="micro_batch", **ALL_LOSSES))
    grouped = balanced(**ALL_LOSSES)
    for part in ("attention", "ffn"):
        grouped[part]["router"] |= {"group_sequences": micro_batch}
    ours, reference = (distributed(pools, c) for c in (case, replace(case, model=grouped)))
    assert_equal(ours, reference, FP64)
    other = distributed(pools, replace(case, micro_batch=6 - micro_batch))
    assert abs(other.aux_losses["ffn/switch"] - ours.aux_losses["ffn/switch"]) > 1e-6


LAYOUT_FREE = {
    "accumulated": Case(micro_batch=1),
    "W 4": Case(world_size=4),
    "one rank": Case(world_size=1, expert_parallel=1, micro_batch=8),
}


@pytest.mark.parametrize("case", LAYOUT_FREE.values(), ids=LAYOUT_FREE.keys())
def test_coefficients_mean_the_same_in_any_layout(pools, case):
    case = replace(case, model=balanced(**ALL_LOSSES))
    reference = one_process(case)
    assert reference.aux_losses.keys() == {
        f"{part}/{name}" for part in ("attention", "ffn") for name in ALL_LOSSES
    }
    assert_equal(distributed(pools, case), reference, FP64)


def biases_around_evaluation(case: Case) -> list[dict[str, torch.Tensor]]:
    """On every rank: at first, after a step, and after an evaluation."""
    config, mesh = case.config(), make_mesh(case.expert_parallel)
    model = build_model(config.model, parallelize=partial(shard_experts, mesh=mesh))
    engine = Engine(model, config, mesh, torch.device("cpu"))

    def biases() -> dict[str, torch.Tensor]:
        state = engine.model.state_dict()
        return {name: value.clone() for name, value in state.items() if name.endswith("bias.value")}

    batch, result = case.batch(), [biases()]
    rows = torch.arange(mesh.rank, SEQUENCES, mesh.world_size)
    engine.step([Batch(batch.tokens[rows], batch.token_mask[rows])], lr=1e-2)
    result.append(biases())
    # Where all experts are here, ranks may bring unequal numbers of batches.
    batches = [Batch(batch.tokens[row][None]) for row in rows]
    perplexity(engine.deepspeed, batches[: 1 + mesh.rank], torch.device("cpu"))
    result.append(biases())
    engine.close()
    return result


def test_evaluation_moves_no_bias_and_needs_no_other_rank(pools):
    """Though statistics are pooled over ranks in training."""
    model = balanced(bias_rate=0.03, scope="global_batch", switch=0.1)
    case = Case(expert_parallel=1, micro_batch=4, model=model)
    of_rank_0, of_rank_1 = pools(2).run(biases_around_evaluation, case)
    for initial, stepped, evaluated in (of_rank_0, of_rank_1):
        assert initial
        for name, bias in stepped.items():
            assert not torch.equal(bias, initial[name]), name
            assert torch.equal(bias, evaluated[name]), name
            assert torch.equal(bias, of_rank_0[1][name]), name
