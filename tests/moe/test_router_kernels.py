"""The fused kernels of a router and of sorting, in Triton's interpreter, equal the plain steps."""

import pytest
import torch

from moa_dist.config.routers import RouterConfig
from moa_dist.moe import fused_choice, router, router_kernels, sort_kernels
from moa_dist.moe.expert_sort import sort_by_expert
from moa_dist.moe.fused_choice import Chosen, Options, StatisticsGradients
from moa_dist.moe.initialize import initialize
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_gradient_kernel import choose_backward
from moa_dist.moe.router_logits import _WideProduct

CASES = {
    "SwitchHead": {"num_experts": 5, "top_k": 2, "score": "sigmoid", "groups": 3},
    "sigma-MoE": {"num_experts": 37, "top_k": 7, "score": "sigmoid"},
    "MoA": {"num_experts": 16, "top_k": 8, "score": "softmax"},
    "JetMoE": {"num_experts": 8, "top_k": 2, "score": "softmax", "gate": "renormalized"},
    "detached": {"num_experts": 6, "top_k": 3, "score": "sigmoid", "gate": "renormalized_detached"},
    "every expert": {"num_experts": 4, "top_k": 4, "score": "softmax", "gate": "renormalized"},
    "one expert": {"num_experts": 1, "top_k": 1, "score": "sigmoid", "groups": 2},
    "bias": {"num_experts": 9, "top_k": 2, "score": "sigmoid", "biased": True},
}
B, S, D = 3, 21, 12


def router_of(
    groups: int = 1, biased: bool = False, **fields: object
) -> tuple[Router, RouterConfig]:
    config = RouterConfig(**fields, **({"balance": {"bias_rate": 0.1}} if biased else {}))
    module = Router(config, D, num_groups=groups)
    initialize(module, seed=0)
    if module.bias is not None:
        module.bias.value.copy_(torch.linspace(-1, 1, config.num_experts))
    return module, config


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_choice_statistics_and_gradients(case, padded):
    module, config = router_of(**case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, D, generator=generator) * 2
    mask = torch.arange(S) < torch.tensor([[S], [S - 4], [0]]) if padded else None
    plain: Routing = module(x, mask)
    logits = module.logits(x.flatten(0, 1)).detach()
    flat_mask = None if mask is None else mask.flatten()
    options = Options(config.top_k, module.num_groups, B, config.score, config.gate, 0.0)
    bias = None if module.bias is None else module.bias.value
    fused = router_kernels.choose(logits, bias, None, flat_mask, None, options)
    assert torch.equal(fused.ids, plain.topk_ids)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(fused.weights, plain.topk_weights, **close)
    statistics = plain.statistics._asdict()
    for name in statistics.keys() & set(fused._fields):
        torch.testing.assert_close(getattr(fused, name), statistics[name], msg=name, **close)

    again = router_kernels.choose(logits.flip(0), None, None, flat_mask, fused.ids, options)
    assert torch.equal(again.ids, fused.ids)
    repeated = module(x.flatten(0, 1).flip(0).view_as(x), mask, plain.choice())
    torch.testing.assert_close(again.weights, repeated.topk_weights, **close)
    assert torch.equal(again.load, repeated.statistics.load)

    def upstream(value):
        return torch.randn(value.shape, generator=generator)

    of_weights = upstream(fused.weights)
    of_statistics = StatisticsGradients(
        upstream(fused.probability), upstream(fused.z), upstream(fused.entropy)
    )
    saved = (logits, fused.ids, fused.weights, fused.log_sum, flat_mask, options)
    weight = module.logits.weight
    for used in ((True, True), (True, False), (False, True)):
        grads = of_weights if used[0] else None
        sums = of_statistics if used[1] else StatisticsGradients(None, None, None)
        ours = choose_backward(grads, sums, *saved)
        values = [plain.topk_weights] if used[0] else []
        slopes = [of_weights] if used[0] else []
        if used[1]:
            values += [plain.statistics.probability, plain.statistics.z, plain.statistics.entropy]
            slopes += of_statistics
        (theirs,) = torch.autograd.grad(values, weight, slopes, retain_graph=True)
        torch.testing.assert_close(ours.T @ x.flatten(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_hidden_experts_are_chosen_last_and_no_expert_twice():
    logits = torch.randn(B * S, 6, generator=torch.Generator().manual_seed(0))
    uniform = torch.ones(B * S, 1, 6)
    uniform[:, :, [1, 4]] = 0.0
    for top_k in (4, 5):
        options = Options(top_k, 1, B, "softmax", "raw", 0.5)
        ids = router_kernels.choose(logits, None, uniform, None, None, options).ids.squeeze(1)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert not set(ids[:, :4].flatten().tolist()) & {1, 4}


def test_logits_that_are_not_finite_choose_experts_that_exist():
    options = Options(2, 1, 1, "sigmoid", "raw", 0.0)
    logits = torch.full((4, 5), float("nan"))
    chosen = router_kernels.choose(logits, None, None, None, None, options)
    assert chosen.ids.min() >= 0
    assert chosen.ids.max() < 5
    assert chosen.probability.isnan().all()


def test_the_operator_is_differentiable_in_the_logits(monkeypatch):
    """On the meta device, where its kernels do not run, shapes and types must still fit."""
    logits = torch.empty(B * S, 10, device="meta", requires_grad=True)
    options = Options(2, 2, B, "sigmoid", "raw", 0.0)
    chosen = fused_choice.choose(logits, None, None, None, None, options)
    assert isinstance(chosen, Chosen)
    (chosen.weights.sum() + chosen.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape
    assert not chosen.load.requires_grad


@pytest.mark.parametrize("num_experts", [1, 3, 40, 300])
@pytest.mark.parametrize("num_assignments", [0, 1, 127, 400])
def test_sorting_by_counting(num_experts, num_assignments):
    generator = torch.Generator().manual_seed(num_assignments)
    expert = torch.randint(num_experts + 1, (num_assignments,), generator=generator)
    ours = sort_kernels.sort_by_expert(expert, num_experts, [6, 2])
    theirs = sort_by_expert(expert, num_experts, [6, 2])
    for a, b in zip((*ours[:3], *ours.quotients), (*theirs[:3], *theirs.quotients), strict=True):
        assert torch.equal(a, b)


def test_wide_logits_of_narrow_rows(monkeypatch):
    """The gradient, with the tensor cores' product of narrow operands replaced by a wide one."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (40, 7)
    )
    real = torch.mm

    def wide(a, b, out_dtype=None):
        return real(a, b) if out_dtype is None else real(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", wide)
    logits = _WideProduct.apply(x, weight)
    exact = x.double() @ weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(logits.shape, generator=generator)
    ours = torch.autograd.grad(logits, (x, weight), upstream)
    theirs = torch.autograd.grad(exact, (x, weight), upstream.double())
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_fused_routers_keep_to_groups_and_scale(padded, monkeypatch):
    """The choice is made in plain steps, and all else by the kernels."""
    limit = {"num_groups": 4, "top_groups": 2}
    module, _ = router_of(
        groups=2, biased=True, num_experts=8, top_k=3, score="sigmoid", route_scale=2.5,
        gate="renormalized", group_limit=limit,
    )  # fmt: skip
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(S) < torch.tensor([[S], [S - 4], [0]]) if padded else None
    plain = module(x, mask)
    given = []

    def choose(logits, bias, uniform, token_mask, ids, options):
        given.append(ids)
        return Chosen(*router_kernels.choose(logits, bias, uniform, token_mask, ids, options))

    monkeypatch.setattr(router, "can_fuse", lambda *_: True)
    monkeypatch.setattr(router, "choose", choose)
    fused = module(x, mask)
    assert torch.equal(given[0], plain.topk_ids)
    assert torch.equal(fused.topk_ids, plain.topk_ids)
    torch.testing.assert_close(fused.topk_weights, plain.topk_weights.detach())
    for ours, theirs in zip(fused.statistics.present(), plain.statistics.present(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
