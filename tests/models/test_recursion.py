"""Tokens that choose how often they recur: equal to the authors' values, and to what it must mean.

tests/golden/relatives/mor_* were recorded from the code of Mixture-of-Recursions in fp64: with two
Llama layers per recursion, and with a small block of the recorder's own.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.packing import Places
from moa_dist.models.recursion import Recursion, make_recursion
from moa_dist.models.rope import Rotation
from moa_dist.moe.adapt import StepLoad, adapt
from moa_dist.moe.statistics import RoutingStatistics, own_sums
from tests.models.small import small_config
from tests.transfer.test_share import CLOSE, GOLDEN, NAMES

EXPERT = {"kind": "expert_choice", "capacity": [1.0, 0.667, 0.333]}
TOKEN = {"kind": "token_choice", "balance": {"switch": 0.1, "z_loss": 0.001}}
EXPERT_TOY = {
    "kind": "expert_choice",
    "capacity": [0.75, 0.5, 0.25],
    "score": "tanh",
    "scale": 0.3,
    "sampling": 1.0,
    "separate_sampler": True,
    "z_loss": 0.01,
}
# Their bias is added to scores that are scaled, ours to those that are not.
TOKEN_TOY = {
    "kind": "token_choice",
    "score": "sigmoid",
    "scale": 0.5,
    "balance": {"z_loss": 0.001, "bias_rate": 0.05 / 0.5},
}


def config_of(recursion: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 5,
            "d_model": 24,
            "num_layers": 6,
            "num_distinct_layers": 2,
            "recursion": recursion,
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "attention": {
                "kind": "dense",
                "num_heads": 4,
                "num_kv_heads": 2,
                "d_head": 6,
                "rope": {"fraction": 1.0},
            },
            "ffn": {"kind": "dense", "d_ff": 16, "gated": True, "activation": "silu"},
        }
    )


def routers_of(recursion: Recursion) -> dict[str, nn.Parameter]:
    """Parameters by the names of the golden files."""
    if recursion.router is not None:
        return {"router": recursion.router.logits.weight}
    found = {f"{r}.router": logits.weight for r, logits in enumerate(recursion.logits)}
    for r, logits in enumerate(recursion.samplers or ()):
        found[f"{r}.aux_router"] = logits.weight
    return found


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum(losses.values(), torch.zeros((), dtype=torch.float64))


def losses_of(recursion: Recursion, statistics: RoutingStatistics) -> dict[str, Tensor]:
    """Of a router; the authors' losses are of all sequences together."""
    assert recursion.router is not None
    return recursion.router.losses(statistics.as_one_group())


@pytest.mark.parametrize(("name", "section"), [("mor_expert", EXPERT), ("mor_token", TOKEN)])
def test_layers_compute_what_the_authors_code_does(name, section):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    model = build_model(config_of(section)).double()
    recursion = model.stack.recursion
    parameters = routers_of(recursion)
    for i, block in enumerate(model.stack.blocks()):
        for ours, theirs in NAMES.items():
            parameters[f"block.{i}.{theirs}"] = block.get_submodule(ours).weight
    for key, parameter in parameters.items():
        parameter.data.copy_(golden[f"param.{key}"])
    x = golden["x"].requires_grad_()
    rotation = Rotation.at(torch.arange(12)[None], 6, RopeConfig(fraction=1.0), x.dtype)
    mask = AttentionMask(True, rotation=rotation)
    output = model.stack(x, LayerMasks(mask, mask))
    torch.testing.assert_close(output.x, golden["y"], **CLOSE)
    losses = model.stack.losses(output, None)
    if recursion.router is not None:
        statistics = output.statistics[model.stack.depth_call]
        losses = losses_of(recursion, statistics)
        torch.testing.assert_close(losses["switch"], 0.1 * golden["balancing_loss"], **CLOSE)
        torch.testing.assert_close(losses["z_loss"], 0.001 * golden["router_z_loss"], **CLOSE)
        share = statistics.load.sum((0, 1)) / 24
        torch.testing.assert_close(share, golden["balancing_ratio"].float())
    else:
        sampling = 0.001 * golden["sampling_loss"]
        torch.testing.assert_close(losses["depth/sampling"], sampling, **CLOSE)
    ((output.x * golden["grad_y"]).sum() + total(losses)).backward()
    torch.testing.assert_close(x.grad, golden["grad.x"], **CLOSE)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{key}"], **CLOSE, msg=key)
    assert {f"grad.{key}" for key in parameters} | {"grad.x"} == {
        key for key in golden if key.startswith("grad.")
    }


class Block(nn.Module):
    """`x + w_b tanh(w_a x_t + w_c m_t)`, m_t the mean of the tokens up to t."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterDict({n: golden[f"param.block.0.{n}"] for n in ("w_a", "w_b", "w_c")})

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        hidden = x @ self.w["w_a"].T + mean @ self.w["w_c"].T
        return x + hidden.tanh() @ self.w["w_b"].T


@pytest.mark.parametrize(
    ("name", "section"), [("mor_expert_toy", EXPERT_TOY), ("mor_token_toy", TOKEN_TOY)]
)
def test_any_block_recurs_as_in_the_authors_code(name, section):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    recursion = make_recursion(config_of(section))
    for key, parameter in routers_of(recursion).items():
        parameter.data = golden[f"param.{key}"].clone()
    recursion.double()
    if recursion.router is not None:
        recursion.router.bias.value.copy_(golden["router_bias"] / 0.5)
    block, x = Block(golden), golden["x"].requires_grad_()
    seen: dict[int, Tensor] = {}

    def run(r: int, h: Tensor, places: Places | None) -> Tensor:
        seen[r] = h if places is None or places.real is None else h[places.real]
        return block(h)

    output = recursion(x, None, run)
    torch.testing.assert_close(output.x, golden["y"], **CLOSE)
    for r, h in seen.items():
        theirs = golden[f"block_in.{r}"]
        if recursion.router is not None:
            chosen = golden["depth"][golden[f"selected_mask.{r}"]]
            assert len(h.flatten(0, -2)) == len(chosen)
        else:
            torch.testing.assert_close(h, theirs, **CLOSE)
    losses = output.losses
    if recursion.router is not None:
        assert torch.equal(output.depth.topk_ids.view(2, 13), golden["depth"])
        losses = losses_of(recursion, output.depth.statistics)
    ((output.x * golden["grad_y"]).sum() + total(losses)).backward()
    torch.testing.assert_close(x.grad, golden["grad.x"], **CLOSE)
    parameters = routers_of(recursion) | {f"block.0.{n}": w for n, w in block.w.items()}
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{key}"], **CLOSE, msg=key)


def test_the_bias_of_depths_moves_as_theirs():
    golden = load_file(GOLDEN / "mor_token_toy.safetensors")
    recursion = make_recursion(config_of(TOKEN_TOY)).double()
    router = recursion.router
    router.logits.weight.data.copy_(golden["param.router"])
    router.bias.value.copy_(golden["step.router_bias"][0] / 0.5)
    for x, share, bias in zip(
        golden["step.x"],
        golden["step.balancing_ratio"],
        golden["step.router_bias"][1:],
        strict=True,
    ):
        statistics = router(x).statistics
        load = statistics.load.sum(0)
        torch.testing.assert_close(load[0] / 26, share.float())
        step = StepLoad(load, statistics.num_tokens.sum(), own_sums(statistics))
        adapt({0: router}, {0: step})
        torch.testing.assert_close(router.bias.value[0] * 0.5, bias, **CLOSE)


def model_of(section: dict[str, Any], **more: Any) -> LanguageModel:
    """In fp64; layers before and after those that recur."""
    fields = {"num_layers": 8, "num_distinct_layers": 2, "prelude": 1, "coda": 1}
    config = small_config("moa", recursion=section, **fields | more)
    model = build_model(config, seed=3).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("section", [EXPERT, EXPERT_TOY, TOKEN, TOKEN_TOY])
def test_padding_changes_nothing(section):
    model = model_of(section)
    tokens = torch.arange(18).view(2, 9) % 19
    whole = model(tokens)
    padded = torch.cat([tokens.new_zeros(2, 2), tokens, tokens.new_zeros(2, 3)], dim=1)
    token_mask = torch.zeros_like(padded, dtype=torch.bool)
    token_mask[:, 2:11] = True
    output = model(padded, token_mask)
    torch.testing.assert_close(output.logits[:, 2:11], whole.logits, **CLOSE)
    assert output.aux_losses.keys() == whole.aux_losses.keys()
    for name, loss in whole.aux_losses.items():
        torch.testing.assert_close(output.aux_losses[name], loss, **CLOSE)


@pytest.mark.parametrize("section", [EXPERT_TOY, TOKEN])
def test_only_tokens_that_recur_are_computed(section):
    model, rows = model_of(section), []
    _, core, *_ = model.stack.blocks()
    core.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    tokens = torch.arange(24).view(2, 12) % 19
    output = model(tokens, trace=True)
    calls = [model.stack.plan[i].call for i in (1, 3, 5)]
    depth = sum(output.traces[call].running.long() for call in calls)
    if section is EXPERT_TOY:
        assert rows == [9, 6, 3]
        assert [(depth > r).sum(1).tolist() for r in range(3)] == [[9, 9], [6, 6], [3, 3]]
    else:
        ids = output.traces[calls[0]].routing["depth"].topk_ids
        assert torch.equal(depth, ids.view(2, 12) + 1)
        assert output.token_sums["depth/recursions"].tolist() == [depth.sum(), 24]
        assert rows == [12, *(max(1, int((depth > r).sum(1).max())) for r in (1, 2))]


@pytest.mark.parametrize("section", [TOKEN, TOKEN_TOY])
def test_token_choice_continues_from_a_cache(section):
    model = model_of(section).eval()
    tokens = torch.randint(19, (3, 12), generator=torch.Generator().manual_seed(1))
    token_mask = torch.ones_like(tokens, dtype=torch.bool)
    token_mask[1, :2] = False
    whole, cache, parts = model(tokens, token_mask).logits, model.empty_cache(), []
    for start, stop in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 12)):
        output = model(tokens[:, start:stop], token_mask[:, start:stop], cache)
        parts.append(output.logits)
        cache = output.cache
    torch.testing.assert_close(torch.cat(parts, 1)[token_mask], whole[token_mask], **CLOSE)
    rows = torch.tensor([2, 1])
    more = torch.tensor([[4], [7]])
    again = model(more, None, cache.select(rows)).logits
    longer = torch.cat([tokens[rows], more], dim=1)
    mask = torch.cat([token_mask[rows], torch.ones(2, 1, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(again, model(longer, mask).logits[:, -1:], **CLOSE)


@pytest.mark.parametrize("section", [EXPERT, EXPERT_TOY, TOKEN, TOKEN_TOY])
def test_recomputed_it_computes_the_same(section):
    tokens, gradients = torch.arange(18).view(2, 9), []
    for recompute in (False, True):
        model = model_of(section)
        model.stack.recompute = frozenset({"block"} if recompute else ())
        output = model(tokens)
        (output.logits.square().mean() + total(output.aux_losses)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)
