"""Which parameters decay, and which are updated by what; Muon's update of one matrix."""

import pytest
import torch

from moa_dist.config.model import ModelConfig
from moa_dist.config.run import OptimizerConfig
from moa_dist.models.language_model import build_model
from moa_dist.train.muon import orthogonalize
from moa_dist.train.optimizer import make_optimizer, parameter_groups, set_learning_rate

MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 31,
        "d_model": 16,
        "num_layers": 1,
        "tie_embeddings": False,
        "attention": {
            "kind": "switchhead",
            "num_heads": 2,
            "d_head": 8,
            "router": {"num_experts": 3, "top_k": 2, "score": "sigmoid"},
        },
        "ffn": {
            "kind": "moe",
            "d_expert": 8,
            "output_bias": True,
            "router": {"num_experts": 4, "top_k": 2, "score": "softmax"},
        },
    }
)


def steps_with(config: OptimizerConfig, gradient: float | torch.Generator) -> dict[str, tuple]:
    """Every parameter of a model before and after a step with equal or random gradients."""
    model = build_model(MODEL)
    optimizer = make_optimizer(config, parameter_groups(model, config))
    set_learning_rate(optimizer, config.lr)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if isinstance(gradient, torch.Generator):
            parameter.grad = torch.randn(parameter.shape, generator=gradient)
        else:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return {name: (before[name], p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_weight_decay(kind, decay):
    config = OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.5, decay=decay)
    for name, (before, after) in steps_with(config, gradient=0.0).items():
        is_vector = "norm" in name or "bias" in name
        factor = 1.0 if is_vector and decay == "matrices" else 0.95
        assert torch.allclose(after, before * factor), name


def test_routers_have_a_rate_of_their_own():
    config = OptimizerConfig(lr=0.1, router_lr=0.5, weight_decay=0.0)
    for name, (before, after) in steps_with(config, gradient=1.0).items():
        expected = 0.05 if "router" in name else 0.1  # Adam's first step is the rate
        assert torch.allclose(before - after, torch.tensor(expected)), name


def test_muon_updates_the_matrices_of_layers_alone():
    """The gradient is of rank one: so is its update, which Adam's equals up to scale."""
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.0)
    by_muon = set()
    for name, (before, after) in steps_with(config, gradient=1.0).items():
        if not torch.allclose(before - after, torch.tensor(0.1)):
            by_muon.add(name)
    assert by_muon == {
        *(f"stack.layers.0.attention.{part}.weight" for part in "qkvo"),
        *(f"stack.layers.0.ffn.{part}.weight" for part in ("up", "down")),
    }


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_singular_values_come_near_one(shape):
    """Those of every matrix by itself, whatever the others' size."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    matrices *= 10.0 ** torch.arange(-3, 2).view(5, 1, 1)
    matrices[2] = 0
    result = orthogonalize(matrices)
    for i in (0, 1, 3, 4):
        left, values, right = torch.linalg.svd(matrices[i], full_matrices=False)
        ours = torch.linalg.svdvals(result[i])
        assert ours.max() < 1.25
        assert ours[values > 0.02 * values.max()].min() > 0.6
        # The directions stay: between the two bases the result is diagonal.
        core = left.T @ result[i] @ right.T
        assert torch.allclose(core, core.diag().diag(), atol=1e-9)
    assert not result[2].any()


def test_update_of_every_expert_is_orthogonal():
    """Up to one scale per matrix, in a step of a model with random gradients."""
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.0)
    num_matrices = 0
    generator = torch.Generator().manual_seed(0)
    for name, (before, after) in steps_with(config, generator).items():
        if name.rpartition(".")[0].endswith((".v", ".o", ".up", ".down")):
            experts = (before - after) / (0.1 * 0.2 * max(before.shape[1:]) ** 0.5)
            num_matrices += len(experts)
            for values in torch.linalg.svdvals(experts):
                assert values.max() < 1.25, name
                assert values.min() > 0.6, name
    assert num_matrices == 2 * 2 * 3 + 2 * 4  # of 2 heads and the FFN


def test_update_of_a_matrix_is_that_of_torch():
    """Which computes in bf16, and scales to the size of AdamW's updates on request."""
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.5)
    model = build_model(MODEL)
    matrix = model.stack.layers[0].attention.q.weight
    theirs = torch.nn.Parameter(matrix.detach().clone())
    ours = make_optimizer(config, parameter_groups(model, config))
    set_learning_rate(ours, config.lr)
    peer = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(matrix.shape, generator=generator)
        matrix.grad, theirs.grad = gradient.clone(), gradient.clone()
        before = matrix.detach().clone()
        ours.step()
        peer.step()
        step = (matrix - before).norm()
        assert ((matrix - theirs).norm() / step).item() < 0.05


def test_fused_updates_are_those_of_torch():
    config = OptimizerConfig(kind="adamw", lr=1e-2)
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = build_model(MODEL)
        optimizer = make_optimizer(config, parameter_groups(model, config), fused=fused)
        set_learning_rate(optimizer, config.lr)
        assert optimizer.defaults["fused"] is fused
        for _ in range(2):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * number)
            optimizer.step()
        results.append(list(model.parameters()))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
