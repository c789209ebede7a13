"""Sparse Universal Transformer: what its authors' code computes, in fp64, over all repeats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.models.counts import count
from moa_dist.models.halting import Halting, HaltingState, expected_depth
from moa_dist.models.mask import AttentionMask, LayerMasks
from moa_dist.models.stack import LayerStack
from moa_dist.moe.initialize import initialize
from moa_dist.moe.statistics import total
from tests.models.small import ATTENTION, LENGTH, PLACEMENTS, small_config, small_model, tokens_of

GOLDEN = Path(__file__).parent.parent / "golden" / "relatives"
REPEATS, CLIP = 4, 63


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def router(group_sequences: int) -> dict[str, object]:
    return {
        "kind": "mlp",
        "num_experts": 6,
        "top_k": 2,
        "d_hidden": 24,
        "activation": "tanh",
        "score": "softmax",
        "gate_eps": 1e-6,
        "group_sequences": group_sequences,
        "balance": {"mutual_information": 1.0},
    }


def model(threshold: float, group_sequences: int) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 8,
            "d_model": 24,
            "num_layers": REPEATS,
            "num_distinct_layers": 1,
            "norm_placement": "post",
            "halting": {"kind": "stick_breaking", "threshold": threshold, "loss": 2.0},
            "attention": {
                "kind": "moa",
                "d_head": 4,
                "heads_per_expert": 2,
                "rope": None,
                "relative_positions": CLIP,
                "router": router(group_sequences),
            },
            "ffn": {
                "kind": "moe",
                "d_expert": 12,
                "activation": "gelu",
                "bias": True,
                "router": router(group_sequences),
            },
        }
    )


def ours_of(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Their tensors by our names: a bias of hidden units is the last row of our weight."""
    theirs = {
        n.removeprefix(f"{prefix}."): v for n, v in golden.items() if n.startswith(f"{prefix}.")
    }
    routers = {
        f"{ours}.router.logits.{name}": theirs[f"{part}_gate_{of}"]
        for ours, part in (("attention", "attn"), ("ffn", "ffn"))
        for name, of in (("hidden.weight", "in"), ("bias", "in_bias"), ("out.weight", "out"))
    }
    norms = {
        f"{ours}.{name}": theirs[of]
        for ours, norm in (("attention_norm", "norm1"), ("ffn_norm", "norm2"))
        for name, of in (("weight", norm), ("bias", f"{norm}_bias"))
    }
    return (
        routers
        | norms
        | {
            "attention.q.weight": theirs["w_q"],
            "attention.k.weight": theirs["w_k"],
            "attention.v.weight": theirs["w_v"],
            "attention.o.weight": theirs["w_o"],
            "attention.positions.vectors": theirs["rel_pos"][:, :, 1 : 2 * CLIP + 2],
            "ffn.up.weight": torch.cat([theirs["ffn_in"], theirs["ffn_in_bias"][:, None]], dim=1),
            "ffn.down.weight": theirs["ffn_out"],
            "ffn.down_bias.value": theirs["ffn_out_bias"],
            "halting.gate.hidden.weight": theirs["halt_in"],
            "halting.gate.bias": theirs["halt_in_bias"],
            "halting.gate.out.weight": theirs["halt_out"],
        }
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("name", "threshold", "causal"), [("causal", 0.999, True), ("padded", 0.99, False)]
)
def test_it_computes_what_its_authors_do(name, threshold, causal, recompute):
    golden = load_file(GOLDEN / f"sut_{name}.safetensors")
    x = golden["x"].requires_grad_()
    stack = LayerStack(model(threshold, len(x)), recompute=recompute).double()
    stack.layers[0].load_state_dict(ours_of(golden, "param"))
    real = ~golden["pad"] if "pad" in golden else torch.ones(x.shape[:2], dtype=torch.bool)
    mask = AttentionMask(causal, real, real) if "pad" in golden else AttentionMask(causal)
    output = stack(x, LayerMasks(mask, mask), trace=not recompute)
    halting = output.state.halting

    close(output.x[real], golden["y"][real])
    depth = expected_depth(halting, REPEATS)[real].mean()
    close(depth, golden["act_loss"][0])
    if not recompute:
        running = torch.stack([trace.running for trace in output.traces.values()])
        assert torch.equal(running, golden["mid.survival"] > 0)
        assert torch.equal(halting.applications, running.sum(0))
    ((output.x * golden["grad_y"]).sum() + 2.0 * depth).backward(retain_graph=True)
    for ours, gradient in ours_of(golden, "grad").items():
        close(stack.layers[0].get_parameter(ours).grad, gradient)
    close(x.grad, golden["grad.x"])

    stack.zero_grad()
    x.grad = None
    losses = {}
    for key, gate in stack.routers().items():
        calls = [value for call, value in output.statistics.items() if call.key == key]
        (losses[key[1]],) = gate.losses(total(calls)).values()
    close(losses["attention.query"], golden["mi_corrected_attention"][0])
    close(losses["ffn"], golden["mi_corrected_ffn"][0])
    sum(losses.values()).backward()
    for ours, gradient in ours_of(golden, "grad_mi_corrected").items():
        found = stack.layers[0].get_parameter(ours).grad
        if gradient.norm() > 0:
            close(found, gradient)
    close(x.grad, golden["grad_mi_corrected.x"])


class Alternating(Halting):
    """Halts other tokens in every call, unless it is given a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.calls = nn.Identity(), 0

    def macs(self, num_tokens: int) -> int:
        return 0

    def forward(self, x, token_mask, past, choice=None) -> HaltingState:
        self.calls += 1
        one = x.new_ones(x.shape[:2])
        running = one.cumsum(1) % 3 != self.calls % 3 if choice is None else choice
        inner = x if past is None else past.inner
        return HaltingState(inner, torch.zeros_like(x), one, one, running, running.long())

    def losses(self, state, token_mask, num_applications) -> dict[str, Tensor]:
        return {}


def test_any_way_to_halt_keeps_its_choices_when_recomputed():
    gradients = []
    for recompute in (False, True):
        stack = LayerStack(model(0.999, 2), recompute=recompute)
        initialize(stack, seed=0)
        stack.double().layers[0].halting = Alternating()
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)).double()
        mask = AttentionMask(True)
        stack(x.requires_grad_(), LayerMasks(mask, mask)).x.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def halting_model(attention: str | dict[str, Any], objective: str = "causal", **more: object):
    """Tokens of a prelude and a coda take these; between them they halt where they like."""
    halting = {"kind": "stick_breaking", "threshold": 0.9, "loss": 0.1}
    sizes = {"num_layers": 6, "num_distinct_layers": 1, "prelude": 1, "coda": 1}
    fields = {"position": "sinusoidal", "objective": objective, "halting": halting}
    result = small_model(attention=attention, **(fields | sizes | more))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("halting.gate.out.weight"):
                parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(0))
    return result


def depths(model, *inputs) -> Tensor:
    traces = model(*inputs, trace=True).traces
    return torch.stack([t.running for t in traces.values() if t.running is not None]).sum(0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_with_a_cache_and_padding_tokens_halt_where_they_did(attention, placement):
    model, tokens = halting_model(attention, norm_placement=placement), tokens_of()
    whole = model(tokens).logits
    assert len(set(depths(model, tokens).flatten().tolist())) > 1
    first = model(tokens[:, :5], cache=model.empty_cache())
    second = model(tokens[:, 5:], cache=first.cache)
    parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)

    real = torch.arange(LENGTH) < torch.tensor([LENGTH, 5])[:, None]
    padded = model(tokens, real)
    alone = model(tokens[1:, :5])
    torch.testing.assert_close(padded.logits[1, :5], alone.logits[0], rtol=1e-9, atol=1e-9)
    taken, number = padded.token_sums["halting/applications"].tolist()
    assert number == LENGTH + 5
    assert taken == depths(model, tokens, real).sum()
    losses = [output.aux_losses["halting/depth"] for output in (model(tokens[:1]), alone)]
    torch.testing.assert_close(padded.aux_losses["halting/depth"], sum(losses) / 2)


@pytest.mark.parametrize(
    "attention",
    ["moa", "switchhead", ATTENTION["moa"] | {"relative_positions": 3}],
    ids=["moa", "switchhead", "relative positions"],
)
def test_tokens_of_both_texts_halt_in_translation(attention):
    model = halting_model(attention, "translation", prelude=0, coda=0)
    target, source = tokens_of(), tokens_of(2, 6, seed=1)
    whole = model(target, source=source)
    assert {"halting/applications", "encoder/halting/applications"} == whole.token_sums.keys()
    first = model(target[:, :5], cache=model.empty_cache(), source=source)
    second = model(target[:, 5:], cache=first.cache)
    parts = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(parts, whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("own", [["norms"], ["routers", "norms"]])
def test_layers_that_share_parts_share_their_gate(own):
    sharing = {"own": own, "vectors": True}
    model = halting_model("moa", sharing=sharing)
    gates = [name for name, _ in model.named_parameters() if "halting" in name]
    assert len(gates) == 3
    tokens = tokens_of()
    loss = model(tokens).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "halting" in name)


def test_who_never_halts_is_computed_to_the_end_and_counted():
    """With a threshold of 1 nobody leaves, and all applications but the first have a gate."""
    config = small_config(
        attention="moa", num_layers=4, num_distinct_layers=1, halting={"kind": "stick_breaking"}
    )
    without = config.model_copy(update={"halting": None})
    gate = count(config, 8).training.macs["halting"]
    assert gate == 8 * 3 * (config.d_model + 2) * config.d_model
    total, others = (count(each, 8).training.total_macs for each in (config, without))
    assert total - others == gate
