"""What is particular to a kind is reported as means over tokens, by name."""

import pytest
import torch

from moa_dist.config.family import MoHConfig, ReLURouterConfig, ResidualMoEConfig
from moa_dist.config.routers import RouterConfig
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moh import MoHAttention
from moa_dist.models.residual_moe import ResidualMoE
from moa_dist.moe.router_kinds import make_router
from moa_dist.moe.statistics import report
from moa_dist.observe.routing import routing_summary

B, S, D = 2, 6, 16
REAL = torch.arange(S) < torch.tensor([S, 4])[:, None]
TOPK = RouterConfig(num_experts=5, top_k=2, score="softmax", gate="renormalized")


def summary(statistics, router):
    return routing_summary(report(statistics), router.mean_names)


def tokens():
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_relu_router_tells_how_many_experts_tokens_take(num_groups):
    config = ReLURouterConfig(num_experts=6, top_k=2, sparsity=0.25, max_experts=5)
    router = make_router(config, D, num_groups=num_groups)
    torch.nn.init.normal_(router.logits.weight, generator=torch.Generator().manual_seed(1))
    router.sparsity.value.fill_(0.25)
    routing = router(tokens(), REAL)
    found = summary(routing.statistics, router)
    taken = routing.assigned.sum(-1)[REAL.flatten()].flatten().tolist()
    n = len(taken)
    assert found["experts_per_token"] == pytest.approx(sum(taken) / n)
    classes = {
        "took_none": lambda k: k == 0,
        "took_fewer": lambda k: k == 1,
        "took_top_k": lambda k: k == 2,
        "took_up_to_twice": lambda k: 2 < k <= 4,
        "took_more": lambda k: k > 4,
    }
    for name, belongs in classes.items():
        assert found[name] == pytest.approx(sum(map(belongs, taken)) / n), name
    assert len({found[name] for name in classes}) > 2
    assert found["empty_places"] == pytest.approx(1 - sum(taken) / n / 5)
    assert found["sparsity_coefficient"] == pytest.approx(0.25)


def test_moh_tells_the_weight_of_heads_that_are_always_on():
    layer = MoHAttention(MoHConfig(num_shared_heads=2, d_head=4, router=TOPK), D, 1.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = tokens()
    statistics = layer(x, x, x, AttentionMask(True, REAL)).statistics["query"]
    share = layer.stage_gate(x).softmax(-1)[..., 0][REAL].mean().item()
    found = summary(statistics, layer.router)
    assert found["weight_of_shared_heads"] == pytest.approx(share, rel=1e-5)


def test_residual_moe_tells_the_weight_of_experts():
    layer = ResidualMoE(ResidualMoEConfig(d_ff=8, d_expert=4, router=TOPK), D, 1.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = tokens()
    statistics = layer(x, x, REAL).statistics[""]
    share = layer.mix(x).softmax(-1)[..., 0][REAL].mean().item()
    found = summary(statistics, layer.router)
    assert found["weight_of_experts"] == pytest.approx(share, rel=1e-5)


def test_most_routers_report_no_more_than_their_loads():
    router = make_router(TOPK, D)
    torch.nn.init.normal_(router.logits.weight)
    found = summary(router(tokens(), REAL).statistics, router)
    assert set(found) == {
        "drop_share",
        "experts_per_token",
        "entropy",
        "load_imbalance",
        "dead_experts",
    }
