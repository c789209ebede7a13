"""Decides whether ranks exchange tokens or expert weights, by what each would cost.

The time of either is bytes / bandwidth + messages * latency on one rank, from the counts of
`moa_dist.plan.predicted_traffic`; weights also need memory until the backward pass ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from moa_dist.config.parts import PARTS
from moa_dist.config.recompute import recomputed_parts
from moa_dist.config.run import (
    Config,
    ExpertExchangeConfig,
    NetworkConfig,
    tokens_per_sample,
)
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.models.counts import ELEMENT_BYTES
from moa_dist.models.language_model import LanguageModel
from moa_dist.models.stack_counts import token_uses
from moa_dist.moe.routed_module import routed_modules
from moa_dist.moe.router import Router
from moa_dist.moe.sharding import EXCHANGES
from moa_dist.plan.predicted_traffic import (
    Layout,
    Rows,
    StateTraffic,
    expected_rows,
    expert_traffic,
    state_traffic,
)
from moa_dist.plan.states import States, sizes_of, states

MEMORY_SHARE = 0.25
"""Largest share of a rank's memory, states subtracted, that gathered weights may take; the rest is
left for activations."""


class Cost(NamedTuple):
    """Cost of one step on one rank, averaged over ranks."""

    num_bytes: int
    """Bytes sent to other ranks."""
    messages: int
    """Number of collectives."""
    memory: int
    """Bytes held until the backward pass is over, beyond what the rank holds anyway."""

    def seconds(self, network: NetworkConfig) -> float:
        """Return the time of the exchange without overlap."""
        return (
            self.num_bytes / (network.bandwidth_gb * 1e9)
            + self.messages * network.latency_us * 1e-6
        )


@dataclass(frozen=True)
class Decision:
    """What ranks exchange, and why."""

    exchange: ExpertExchangeConfig
    """The choice for each part, without `auto`."""
    because: dict[str, str]
    """A sentence for each part that has experts on other ranks."""


def layout_of(config: Config, world_size: int, exchange: ExpertExchangeConfig) -> Layout:
    """Return the layout that `config` has on `world_size` ranks."""
    model, train = config.model, config.train
    return Layout(
        world_size=world_size,
        expert_parallel=config.parallel.expert_parallel,
        num_micro_batches=max(train.global_batch // (world_size * train.micro_batch), 1),
        num_repeats=model.num_repeats,
        recompute=recomputed_parts(train.recompute),
        element_bytes=ELEMENT_BYTES[train.precision],
        exchange=exchange,
    )


def expected_traffic(
    config: Config, world_size: int, exchange: ExpertExchangeConfig, model: nn.Module
) -> dict[TrafficKey, TrafficVolume]:
    """Predict the traffic of one step over all ranks, with even routing and no drops."""
    layout = layout_of(config, world_size, exchange)
    samples = layout.num_micro_batches * world_size * config.train.micro_batch
    tokens, uses = (
        samples * tokens_per_sample(config),
        token_uses(model, config.data.sequence_length),
    )

    def rows_of(layer: str, name: str) -> Rows:
        router = model.get_submodule(f"{layer}.{name}")
        assert isinstance(router, Router)
        return expected_rows(
            tokens * uses[model.get_submodule(layer)],
            num_groups=router.num_groups,
            num_experts=router.config.num_experts,
            top_k=router.config.experts_per_token(training=True).mean,
            num_ranks=layout.expert_parallel,
            group_limit=router.config.group_limit,
        )

    return expert_traffic(model, layout, rows_of)


def expected_states(config: Config, world_size: int, model: nn.Module) -> States:
    """Predict the states of the fullest rank."""
    sizes = sizes_of(model, config.parallel.expert_parallel)
    layout = layout_of(config, world_size, config.parallel.expert_exchange)
    return states(sizes, layout, config.parallel.zero_stage, config.optimizer)


def expected_state_traffic(config: Config, world_size: int, model: nn.Module) -> StateTraffic:
    """Predict what ZeRO moves in one step over all ranks."""
    sizes = sizes_of(model, config.parallel.expert_parallel)
    layout = layout_of(config, world_size, config.parallel.expert_exchange)
    return state_traffic(sizes.dense, sizes.experts, layout, config.parallel.zero_stage)


def exchange_costs(config: Config, world_size: int, model: nn.Module) -> dict[str, dict[str, Cost]]:
    """Estimate what each exchange costs, for each part with sharded experts."""
    ep = config.parallel.expert_parallel
    parts = config.model.routed_parts()
    if ep == 1 or not parts:
        return {}
    part_of = {name: module.part for name, module in routed_modules(model)}
    costs: dict[str, dict[str, Cost]] = {part: {} for part in parts}
    for kind in EXCHANGES:
        exchange = ExpertExchangeConfig.model_validate(dict.fromkeys(PARTS, kind))
        traffic = expected_traffic(config, world_size, exchange, model)
        for part in parts:
            volumes = [v for key, v in traffic.items() if part_of[key.layer] == part]
            costs[part][kind] = Cost(
                sum(v.num_bytes for v in volumes) // world_size,
                sum(v.messages for v in volumes) // world_size,
                gathered_bytes(config, model, part) if kind == "weights" else 0,
            )
    return costs


def gathered_bytes(config: Config, model: nn.Module, part: str) -> int:
    """Return bytes of all experts of a part and their gradients, which live until the backward."""
    elements = sum(
        layer.num_experts * layer.macs_per_row()
        for _, module in routed_modules(model)
        if module.part == part
        for layer in module.held_expert_layers().values()
    )
    return 2 * elements * ELEMENT_BYTES[config.train.precision]


def decide_exchange(
    config: Config, world_size: int, memory: int | None, model: LanguageModel
) -> Decision:
    """Replace `auto` in `parallel.expert_exchange`.

    `model` is the whole model of `config`, on any device. `memory` is the least memory of any rank
    in bytes, None if unknown. All inputs are the same on every rank, so all ranks decide alike.
    """
    wanted = config.parallel.expert_exchange
    costs = exchange_costs(config, world_size, model)
    budget = None
    if memory is not None and costs:
        held = expected_states(config, world_size, model).total
        budget = max(0, int(MEMORY_SHARE * (memory - held)))
    chosen: dict[str, str] = dict.fromkeys(PARTS, "tokens")
    because: dict[str, str] = {}
    for part in PARTS:
        if part not in costs:
            continue
        if getattr(wanted, part) != "auto":
            chosen[part] = getattr(wanted, part)
            because[part] = f"{chosen[part]}, as configured"
            continue
        chosen[part], because[part] = _cheaper(costs[part], config.parallel.network, budget)
        if budget is not None and chosen[part] == "weights":
            budget -= costs[part]["weights"].memory
    return Decision(ExpertExchangeConfig.model_validate(chosen), because)


def _cheaper(costs: dict[str, Cost], network: NetworkConfig, budget: int | None) -> tuple[str, str]:
    tokens, weights = costs["tokens"], costs["weights"]
    times = {kind: cost.seconds(network) for kind, cost in costs.items()}
    compared = (
        f"tokens {_mib(tokens.num_bytes)} in {tokens.messages} messages, {_ms(times['tokens'])}; "
        f"weights {_mib(weights.num_bytes)} in {weights.messages}, {_ms(times['weights'])}"
    )
    if times["tokens"] <= times["weights"]:
        return "tokens", f"tokens, which cost less a step: {compared}"
    if budget is not None and weights.memory > budget:
        return "tokens", (
            f"tokens, since weights would need {_mib(weights.memory)} and {_mib(budget)} are left "
            f"for them: {compared}"
        )
    return "weights", f"weights, which cost less a step: {compared}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
