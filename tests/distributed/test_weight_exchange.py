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
from moa_dist.train import deepspeed_hooks
from moa_dist.train.engine import Engine
from tests.distributed.layouts import AS_IF_LARGE, SEQUENCES, Case, micro_batches

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


def keeps_gathered_weights(with_hook: bool) -> bool:
    """On every rank: whether all repeats of a layer get the same tensors at ZeRO 3."""
    case = Case(zero_stage=3, exchange="weights", precision="fp32")
    config, mesh = case.config(), make_mesh(2)
    shard = partial(shard_experts, mesh=mesh, exchange=config.parallel.expert_exchange)
    model = build_model(config.model, parallelize=shard)
    calls = []

    def remember(_module, args) -> None:
        calls.append([(part, dict(part)) for part in args[2] if part])

    with mock.patch.object(
        deepspeed_hooks,
        "_with_own_dictionaries",
        deepspeed_hooks._with_own_dictionaries if with_hook else lambda _module, args: args,
    ):
        engine = Engine(model, config, mesh, torch.device("cpu"), AS_IF_LARGE)
    model.stack.layers[0].register_forward_pre_hook(remember, prepend=True)
    engine.step(micro_batches(case, mesh), config.optimizer.lr)
    engine.close()
    assert len(calls) == 2 * 2  # repeats and micro-batches
    assert all(calls)
    return all(
        part[name] is before[name] for call in calls for part, before in call for name in before
    )


def test_zero_3_replaces_no_gathered_weights_between_repeats(pools):
    """Without our hook DeepSpeed's do; should they stop, ours is no longer needed."""
    assert pools(2).run(keeps_gathered_weights, True) == [True, True]
    assert pools(2).run(keeps_gathered_weights, False) == [False, False]
