"""What travels under `auto`: what costs less, as far as memory goes; and it says why."""

from typing import Any, get_args

import pytest

from moa_dist.config import Config
from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.models.language_model import meta_model
from moa_dist.moe.sharding import EXCHANGES
from moa_dist.plan.exchange_choice import (
    MEMORY_SHARE,
    Cost,
    Decision,
    decide_exchange,
    exchange_costs,
    expected_states,
)
from moa_dist.plan.predicted_traffic import TRAFFIC

AUTO = {"attention": "auto", "ffn": "auto"}
WORLD_SIZE = 4


def config(exchange: dict[str, str], *, sequence_length: int = 512, **network: float) -> Config:
    router = {"top_k": 2, "score": "sigmoid"}
    return Config.model_validate(
        {
            "name": "test",
            "model": {
                "vocab_size": 100,
                "d_model": 64,
                "num_layers": 8,
                "num_distinct_layers": 2,
                "attention": {
                    "kind": "switchhead",
                    "num_heads": 4,
                    "d_head": 16,
                    "router": router | {"num_experts": 4},
                },
                "ffn": {"kind": "moe", "d_expert": 32, "router": router | {"num_experts": 64}},
            },
            "data": {"train": "none", "sequence_length": sequence_length},
            "parallel": {
                "expert_parallel": 4,
                "expert_exchange": exchange,
                "network": network,
            },
            "train": {"steps": 1, "global_batch": 16, "micro_batch": 4},
        }
    )


def decide(wanted: Config, memory: int | None = None) -> tuple[str, str, Decision]:
    decision = decide_exchange(wanted, WORLD_SIZE, memory, meta_model(wanted.model))
    return decision.exchange.attention, decision.exchange.ffn, decision


def costs_of(wanted: Config) -> dict[str, dict[str, Cost]]:
    return exchange_costs(wanted, WORLD_SIZE, meta_model(wanted.model))


def test_many_tokens_let_weights_travel():
    attention, ffn, decision = decide(config(AUTO))
    assert (attention, ffn) == ("weights", "weights")
    costs = costs_of(config(AUTO))["ffn"]
    assert costs["weights"].num_bytes < costs["tokens"].num_bytes
    sentence = decision.because["ffn"]
    for kind in ("tokens", "weights"):
        assert f"{costs[kind].num_bytes / 2**20:,.1f} MiB in {costs[kind].messages}" in sentence


def test_few_tokens_travel_themselves():
    # Messages cost nothing here, so bytes alone decide.
    attention, ffn, _ = decide(config(AUTO, sequence_length=1, latency_us=0))
    assert (attention, ffn) == ("tokens", "tokens")


def test_latency_decides_where_bytes_are_few():
    """Weights need fewer messages, though more bytes."""
    slow = config(AUTO, sequence_length=1, latency_us=1000)
    costs = costs_of(slow)["ffn"]
    assert costs["weights"].num_bytes > costs["tokens"].num_bytes
    assert costs["weights"].messages < costs["tokens"].messages
    assert decide(slow)[1] == "weights"


def test_weights_travel_only_as_far_as_memory_goes():
    wanted = config(AUTO)
    held = expected_states(wanted, WORLD_SIZE, meta_model(wanted.model)).total
    costs = costs_of(wanted)
    attention, ffn = (costs[part]["weights"].memory for part in ("attention", "ffn"))
    assert decide(wanted, held + int((attention + ffn) / MEMORY_SHARE) + 4)[:2] == (
        "weights",
        "weights",
    )
    # Room for one of them: the attention's is asked for first.
    only_one = held + int(max(attention, ffn) / MEMORY_SHARE) + 4
    assert decide(wanted, only_one)[:2] == ("weights", "tokens")
    *none, decision = decide(wanted, held)
    assert none == ["tokens", "tokens"]
    assert "are left for them" in decision.because["ffn"]


@pytest.mark.parametrize("kind", ["tokens", "weights"])
def test_what_was_chosen_stays(kind):
    attention, ffn, decision = decide(config({"attention": kind, "ffn": "auto"}))
    assert (attention, ffn) == (kind, "weights")
    assert decision.because["attention"] == f"{kind}, as configured"


def test_nothing_to_decide_without_experts_elsewhere():
    alone: dict[str, Any] = config(AUTO).model_dump()
    alone["parallel"]["expert_parallel"] = 1
    attention, ffn, decision = decide(Config.model_validate(alone))
    assert (attention, ffn) == ("tokens", "tokens")
    assert decision.because == {}


def test_every_exchange_has_its_traffic_predicted():
    configurable = get_args(ExpertExchangeConfig.model_fields["ffn"].annotation)
    assert {*EXCHANGES, "auto"} == {*TRAFFIC, "auto"} == {*configurable}
