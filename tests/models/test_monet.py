"""Monet computes what its authors' code computes, in fp64; see `test_relatives`."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moa_dist.config.family import MonetConfig, ThresholdRouterConfig
from moa_dist.models.monet import Monet
from moa_dist.moe.adapt import StepLoad, adapt
from moa_dist.moe.statistics import own_sums
from tests.models.test_relatives import GOLDEN, close


def in_out(*matrices: Tensor) -> Tensor:
    """[out, N, in] each, side by side -> [N, in, out]."""
    return torch.cat([m.permute(1, 2, 0) for m in matrices], dim=1)


def with_bias(matrix: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([matrix, bias[:, None]], dim=1)


def ours(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Their tensors by our names."""
    value = {
        n.removeprefix(f"{prefix}."): v for n, v in golden.items() if n.startswith(f"{prefix}.")
    }
    routers = {
        "first_router.logits.weight": value["router1"].flatten(0, 1),
        "second_router.logits.weight": value["router2"].flatten(0, 1),
    }
    if "u" in value:
        return routers | {
            "first_up.weight": with_bias(value["u"].mT, value["u_bias"]),
            "second_down.weight": with_bias(in_out(value["v"]), value["b"]),
        }
    return routers | {
        "first_up.weight": with_bias(value["u1"].mT, value["u1_bias"]),
        "second_up.weight": with_bias(value["u2"].mT, value["u2_bias"]),
        "first_down.weight": with_bias(in_out(value["v11"], value["v12"]), value["b1"]),
        "second_down.weight": with_bias(in_out(value["v21"], value["v22"]), value["b2"]),
    }


@pytest.mark.parametrize(("decomposition", "d_expert"), [("horizontal", 3), ("vertical", 4)])
def test_monet(decomposition, d_expert):
    golden = load_file(GOLDEN / f"monet_{decomposition}.safetensors")
    x = golden["x"].requires_grad_()
    router = ThresholdRouterConfig(num_experts=8, num_heads=3, top_k=3, group_sequences=len(x))
    config = MonetConfig(decomposition=decomposition, d_expert=d_expert, bias=True, router=router)
    layer = Monet(config, 24, 1.0).double()
    routers = {"1": layer.first_router, "2": layer.second_router}
    before = {
        f"{name}_router.running.{moment}": golden[f"running_{short}{i}"]
        for i, name in (("1", "first"), ("2", "second"))
        for moment, short in (("mean", "mean"), ("variance", "var"))
    }
    layer.load_state_dict(ours(golden, "param") | before)
    output = layer(x, x, None, trace=True)
    (output.y * golden["grad_y"]).sum().backward()
    close(output.y, golden["y"])
    close(x.grad, golden["grad.x"])
    for name, gradient in ours(golden, "grad").items():
        close(layer.get_parameter(name).grad, gradient)
    for i, routing in zip("12", output.routing.values(), strict=True):
        close(routing.head_weights[:, 0].view(2, 9, 3, 8), golden[f"g{i}"])
        kept = (golden[f"g{i}"] > 0).any(2)
        assert torch.equal(routing.assigned.view(kept.shape), kept)
        assert torch.equal(routing.statistics.load[0, 0], kept.sum((0, 1)))

    layer.eval()
    evaluated = layer(x, x, None, trace=True)
    close(evaluated.y, golden["y_eval"])
    for i, routing in zip("12", evaluated.routing.values(), strict=True):
        close(routing.head_weights[:, 0].view(2, 9, 3, 8), golden[f"g{i}_eval"])
    steps = {
        i: StepLoad(s.load.sum(0), s.num_tokens.sum(), own_sums(s))
        for i, s in zip("12", output.statistics.values(), strict=True)
    }
    adapt(routers, steps)
    for i, router in routers.items():
        close(router.running.mean, golden[f"running_mean{i}_after"])
        close(router.running.variance, golden[f"running_var{i}_after"])
