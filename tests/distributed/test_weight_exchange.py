"""Travelling weights travel once per forward and back once, however often a layer repeats."""

from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from moa_dist.moe.experts import expert_layers
from moa_dist.moe.sharding import shard_experts
from tests.distributed.layouts import SEQUENCES, Case

REPEATED = Case(model={"num_layers": 6, "num_distinct_layers": 2})  # 3 repeats


def count_collectives(exchange: dict[str, str]) -> tuple[int, int, int, int]:
    """On every rank: expert tensors, gathers, scatters and all-to-alls of one forward, backward."""
    mesh = make_mesh(2)
    shard = partial(shard_experts, mesh=mesh, exchange=ExpertExchangeConfig(**exchange))
    model = build_model(REPEATED.config().model, parallelize=shard)
    tokens = REPEATED.batch().tokens[torch.arange(mesh.rank, SEQUENCES, 2), :-1]
    spies = [
        mock.patch.object(dist, name, wraps=getattr(dist, name))
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    ]
    gathers, scatters, exchanges = (spy.start() for spy in spies)
    output = model(tokens)
    assert scatters.call_count == 0
    (output.logits.square().mean() + sum(output.aux_losses.values())).backward()
    mock.patch.stopall()
    num_tensors = len(list(expert_layers(model)))
    return num_tensors, gathers.call_count, scatters.call_count, exchanges.call_count


def test_one_gather_and_one_scatter_per_expert_tensor(pools):
    both = {"attention": "weights", "ffn": "weights"}
    for num_tensors, gathers, scatters, exchanges in pools(2).run(count_collectives, both):
        assert num_tensors == 2 * 4  # two layers of V, O, up and down
        assert (gathers, scatters, exchanges) == (num_tensors, num_tensors, 0)


def test_attention_and_ffn_choose_for_themselves(pools):
    mixed = {"attention": "tokens", "ffn": "weights"}
    for _, gathers, scatters, exchanges in pools(2).run(count_collectives, mixed):
        assert (gathers, scatters) == (2 * 2, 2 * 2)
        assert exchanges > 0
