"""Sharing the layers of a trained model, equal to the authors' values of relaxed recursion.

`tests/golden/relatives/rrt_*` were recorded from the code of Relaxed Recursive Transformers' first
author in fp64, with a scale of one: the starting point of Llama layers, and a forward and backward
pass.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moa_dist.cli.main import main
from moa_dist.config import to_yaml
from moa_dist.config.model import ModelConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.config.sharing import SharingConfig
from moa_dist.evaluate.trained import load_trained
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.rope import Rotation
from moa_dist.models.sharing import AdaptedLinear
from moa_dist.moe.borrowing import named_used_modules
from moa_dist.transfer.share import problems_of, share
from tests.models.small import small_config, tokens_of
from tests.transfer.runs import make_run

GOLDEN = Path(__file__).parent.parent / "golden" / "relatives"
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NAMES = {
    "attention.q": "q_proj",
    "attention.k": "k_proj",
    "attention.v": "v_proj",
    "attention.o": "o_proj",
    "ffn.up": "gate_proj",  # what is activated
    "ffn.gate": "up_proj",
    "ffn.down": "down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CASES: dict[str, dict[str, Any]] = {
    "cycle": {"layers": 6, "rank": 3, "d_ff": 16, "start": "average", "own": []},
    "sequence": {"layers": 4, "rank": 2, "d_ff": 12, "start": "stepwise", "own": ["norms"]},
}


def config_of(name: str, **more: Any) -> ModelConfig:
    case = CASES[name]
    return ModelConfig.model_validate(
        {
            "vocab_size": 5,
            "d_model": 24,
            "num_layers": case["layers"],
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "attention": {
                "kind": "dense",
                "num_heads": 4,
                "num_kv_heads": 2,
                "d_head": 6,
                "rope": {"fraction": 1.0},
            },
            "ffn": {"kind": "dense", "d_ff": case["d_ff"], "gated": True, "activation": "silu"},
            **more,
        }
    )


def sharing_of(name: str, **more: Any) -> dict[str, Any]:
    case = CASES[name]
    fields = {"order": name, "adapter_rank": case["rank"], "own": case["own"]}
    return {"num_distinct_layers": 2, "sharing": fields | more}


def slots(name: str) -> list[int]:
    layers = CASES[name]["layers"]
    return [i % 2 if name == "cycle" else i // (layers // 2) for i in range(layers)]


@pytest.mark.parametrize("own", [[], ["norms"]], ids=["norms shared", "own norms"])
@pytest.mark.parametrize("name", CASES)
def test_it_starts_where_the_authors_do(name, own):
    golden = load_file(GOLDEN / f"rrt_{name}_init.safetensors")
    source = build_model(config_of(name)).double()
    for i, block in enumerate(source.stack.blocks()):
        for ours, theirs in NAMES.items():
            block.get_submodule(ours).weight.data.copy_(golden[f"original.{theirs}"][i])
    config = config_of(name, **sharing_of(name, own=own))
    assert not list(problems_of(source.config, config))
    model, explained = share(source, config, CASES[name]["start"])
    assert 0 < explained < 1
    for i, (slot, planned) in enumerate(zip(slots(name), model.stack.plan, strict=True)):
        modules = dict(named_used_modules(model.stack.block(planned)))
        for ours, theirs in NAMES.items():
            module, expected = modules[ours], golden[f"shared.{theirs}"][slot]
            if isinstance(module, AdaptedLinear):
                delta = module.up.weight @ module.down.weight
                torch.testing.assert_close(delta, golden[f"delta.{theirs}"][i], **CLOSE)
                module = module.shared
            elif own:  # the authors start these alike, too, though they are not adapted
                expected = golden[f"original.{theirs}"][i]
            torch.testing.assert_close(module.weight, expected, **CLOSE)


def parameters_of(model: LanguageModel, name: str) -> dict[str, Tensor]:
    """Our parameters by the golden files' names, with an index where several are stacked."""
    found: dict[str, Tensor] = {"norm": model.final_norm.weight}
    for i, (slot, planned) in enumerate(zip(slots(name), model.stack.plan, strict=True)):
        modules = dict(named_used_modules(model.stack.block(planned)))
        for ours, theirs in NAMES.items():
            module = modules[ours]
            if isinstance(module, AdaptedLinear):
                found[f"lora_a.{theirs}/{i}"] = module.down.weight
                found[f"lora_b.{theirs}/{i}"] = module.up.weight
                module = module.shared
            own = "norm" in ours and "norms" in CASES[name]["own"]
            found[f"layer.{theirs}/{i}" if own else f"shared.{theirs}/{slot}"] = module.weight
    return found


def value(golden: dict[str, Tensor], kind: str, key: str) -> Tensor:
    name, _, index = key.partition("/")
    tensor = golden[f"{kind}.{name}"]
    return tensor[int(index)] if index else tensor


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_authors_code_does(name):
    golden = load_file(GOLDEN / f"rrt_{name}_forward.safetensors")
    model = build_model(config_of(name, **sharing_of(name))).double()
    parameters = parameters_of(model, name)
    for key, parameter in parameters.items():
        parameter.data.copy_(value(golden, "param", key))
    x, real = golden["x"].requires_grad_(), golden["attention_mask"].bool()
    rotation = Rotation.at(torch.arange(x.shape[1])[None], 6, RopeConfig(fraction=1.0), x.dtype)
    token_mask = None if real.all() else real
    hidden = []
    for block in model.stack.blocks():
        block.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.x))
    mask = AttentionMask(True, token_mask, token_mask, 0, rotation)
    masks = LayerMasks(mask, mask)
    y = model.final_norm(model.stack(x, masks).x)
    torch.testing.assert_close(torch.stack(hidden)[:, real], golden["hidden"][:, real], **CLOSE)
    torch.testing.assert_close(y[real], golden["y"][real], **CLOSE)
    (y * golden["grad_y"]).sum().backward()
    torch.testing.assert_close(x.grad, golden["grad.x"], **CLOSE)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, value(golden, "grad", key), **CLOSE, msg=key)
    names = {f"grad.{key.partition('/')[0]}" for key in parameters}
    assert names | {"grad.x"} == {key for key in golden if key.startswith("grad.")}


@pytest.mark.parametrize("start", ["average", "stepwise", "first", "last"])
def test_adapters_of_full_rank_reproduce_the_model(start):
    """Where norms are each application's own; prelude and coda are copied."""
    fields = {"num_layers": 6, "prelude": 1, "coda": 1}
    source = build_model(small_config("dense", "dense", num_layers=6), seed=1).double().eval()
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    sharing = {"own": ["norms"], "adapter_rank": 99, "vectors": True}
    config = small_config("dense", "dense", num_distinct_layers=2, sharing=sharing, **fields)
    model, explained = share(source, config, start)
    assert explained == pytest.approx(1)
    tokens = tokens_of()
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits, **CLOSE)


@pytest.mark.parametrize("attention", ["moa", "switchhead"])
def test_experts_and_both_stacks(attention):
    source = build_model(small_config(attention, num_layers=4, objective="translation")).double()
    sharing = {"own": ["attention", "norms", "routers"]}
    config = small_config(
        attention, num_layers=4, num_distinct_layers=1, sharing=sharing, objective="translation"
    )
    model, explained = share(source, config, "last")
    assert explained is None
    for ours, theirs in ((model.encoder, source.encoder), (model.stack, source.stack)):
        own, before = ours.state_dict(), theirs.state_dict()
        for name, tensor in own.items():
            if name.endswith(("ffn.up.weight", "ffn.down.weight")):
                name = name.replace("layers.0.", "layers.3.")
            assert torch.equal(tensor, before[name]), name


def test_what_does_not_fit_is_named():
    shared = small_config(num_layers=4, num_distinct_layers=2)
    problems = problems_of(shared, small_config("moa", num_layers=4))
    keys = [problem.keys[0] for problem in problems]
    assert keys == ["model.num_distinct_layers", "model.num_distinct_layers", "model.attention"]


def test_the_command_creates_a_run(tmp_path):
    source = build_model(small_config("dense", "dense", num_layers=4, vocab_size=270), seed=3)
    make_run(tmp_path / "runs" / "source", source)
    trained = load_trained(tmp_path / "runs" / "source")
    sharing = SharingConfig(adapter_rank=99, own=("norms",))
    model = trained.config.model.changed(num_distinct_layers=2, sharing=sharing)
    config = trained.config.changed(name="shared", model=model)
    (tmp_path / "shared.yaml").write_text(to_yaml(config))
    assert main(["share", str(tmp_path / "runs/source"), str(tmp_path / "shared.yaml")]) == 0
    created = load_trained(tmp_path / "runs" / "shared").model
    tokens = tokens_of()
    torch.testing.assert_close(
        created(tokens).logits, trained.model(tokens).logits, rtol=1e-3, atol=1e-4
    )
