"""Every combination of parts trains all its parameters, and a model keeps no state."""

import copy
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from moa_dist.models.mask import AttentionMask
from tests.models.small import (
    ATTENTION,
    FFN,
    PLACEMENTS,
    VOCABULARY,
    router,
    small_model,
    tokens_of,
)

KINDS = list(product(ATTENTION, FFN))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("ffn", ["dense gated", "moe gated"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_parameter_gets_a_gradient(attention, ffn, placement, norm):
    """One that gets none is dead weight, and ranks that wait for it would hang."""
    model = small_model(
        attention=attention, ffn=ffn, norm_placement=placement, norm=norm, num_layers=1
    )
    tokens = tokens_of(4)
    logits = model(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-12, name


@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_model_keeps_no_state(attention, ffn):
    """A forward without its loss leaks nothing, and a second one says the same."""
    model, tokens = small_model(attention=attention, ffn=ffn), tokens_of()

    def attributes() -> dict:
        return {name: dict(vars(module)) for name, module in model.named_modules()}

    before = attributes()
    first, second = model(tokens), model(tokens)
    assert torch.equal(first.logits, second.logits)
    after = attributes()
    for name, module in before.items():
        assert module.keys() == after[name].keys(), name
        for key, value in module.items():
            assert value is after[name][key], f"{name}.{key}"


@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_model_can_be_copied_and_pickled(attention, ffn):
    model, tokens = small_model(attention=attention, ffn=ffn), tokens_of()
    model(tokens)
    logits = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, logits)


@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_bfloat16_model_stays_near_fp64(attention, ffn):
    """What DeepSpeed's bf16 mode computes: parameters and activations in bfloat16."""
    model, tokens = small_model(attention=attention, ffn=ffn, num_layers=1), tokens_of()
    exact, output = model(tokens), copy.deepcopy(model).bfloat16()(tokens)
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.double() - exact.logits).abs().median() < 0.05
    for statistics in output.statistics.values():
        assert statistics.probability.dtype == torch.float32


def test_tied_head_is_the_embedding():
    model, tokens = small_model(tie_embeddings=True), tokens_of()
    assert model.head is None
    seen = []
    handle = model.final_norm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    logits = model(tokens).logits
    handle.remove()
    torch.testing.assert_close(logits, seen[0] @ model.embedding.weight.T)
    names = [name for name, p in model.named_parameters() if VOCABULARY in p.shape]
    assert names == ["embedding.weight"]


@pytest.mark.parametrize("d_model", [8, 7])
def test_sinusoidal_positions_tell_equal_tokens_apart(d_model):
    """Without any position a constant sequence has the same logits everywhere."""
    attention, tokens = ATTENTION["dense"] | {"rope": None}, torch.full((1, 6), 3)
    fields = {"attention": attention, "ffn": "dense", "d_model": d_model}
    plain = small_model(**fields)(tokens).logits[0]
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    placed = small_model(**fields, position="sinusoidal")(tokens).logits[0]
    assert torch.pdist(placed).min() > 1e-3


def test_unused_losses_are_absent():
    assert small_model(attention="moa")(tokens_of()).aux_losses == {}


def test_dense_model_has_no_statistics():
    output = small_model(attention="dense", ffn="dense")(tokens_of())
    assert output.statistics == {}
    assert output.aux_losses == {}


def test_moe_ffn_equals_its_equation():
    """sigma-MoE (equations 10-12), one token and expert at a time; under peri-norm it is routed
    by another input than the experts read."""
    section = FFN["moe gated"] | {"router": router(4, 2)}
    layer = small_model(ffn=section).stack.layers[0].ffn
    x, router_input = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    y = layer(x, router_input, None).y
    for b, s in product(range(2), range(5)):
        scores = layer.router.logits(router_input[b, s][None])[0].sigmoid()
        expected = torch.zeros(8, dtype=torch.float64)
        for e in scores.topk(2).indices:
            token = x[b, s]
            hidden = F.gelu(token @ layer.up.weight[e]) * (token @ layer.gate.weight[e])
            expected = expected + scores[e] * hidden @ layer.down.weight[e]
        torch.testing.assert_close(y[b, s], expected)


@pytest.mark.parametrize("attention", ["dense", "moa", "switchhead"])
def test_peri_norm_values_and_ffn_read_the_raw_residual(attention):
    """Norms feed a softmax or a sigmoid and nothing else (MoEUT section 2.3)."""
    block = small_model(attention=attention, norm_placement="peri").stack.layers[0]
    seen = []
    for part in (block.attention, block.ffn):
        part.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    block(x, AttentionMask(causal=True))
    (query, key, value, *_), (ffn_input, router_input, *_) = seen
    assert value is x
    for normalized, raw in ((query, x), (key, x), (router_input, ffn_input)):
        torch.testing.assert_close(normalized, F.layer_norm(raw, (8,)))
        assert not torch.allclose(normalized, raw)
