"""Experts that every token uses: what they add, where they count, who holds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa_dist.config.model import ModelConfig
from moa_dist.models.counts import count
from moa_dist.models.language_model import build_model
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moa import MoAAttention
from moa_dist.models.objective import Batch, objective
from moa_dist.models.parameter_roles import Role, parameter_roles
from moa_dist.models.rope import apply_rope
from moa_dist.moe.experts import expert_layers
from tests.models.small import ATTENTION, FFN, PLACEMENTS, small_config, small_model, tokens_of

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SHARED = {
    "moa": ATTENTION["moa"] | {"shared_experts": 2},
    "switchhead": ATTENTION["switchhead"] | {"shared_experts": True},
}
SHARED_FFN = {
    name: FFN[name] | {"shared_expert": {"d_expert": 6, "sigmoid_gate": gate}}
    for name, gate in (("moe", False), ("moe gated", True))
}


def layer_of(kind: str, shared: bool) -> nn.Module:
    section = (SHARED if shared else ATTENTION)[kind]
    model = small_model(attention=section, num_layers=1)
    return model.stack.layers[0].attention


@pytest.mark.parametrize("padded", [False, True])
def test_shared_heads_of_moa(padded):
    """Four heads of queries that meet the layer's two of keys and values."""
    layer, without = layer_of("moa", True), layer_of("moa", False)
    state = layer.state_dict()
    without.load_state_dict({n: v for n, v in state.items() if not n.startswith("shared")})
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)).double()
    real = torch.arange(7) < torch.tensor([7, 4])[:, None] if padded else None
    mask = AttentionMask(True, real, real)
    q = layer.shared.q(x).view(2, 7, 2, 2, 4).permute(2, 0, 3, 1, 4)  # [n, B, h, T, d]
    k, v = (p(x).view(2, 7, 2, 4).transpose(1, 2) for p in (layer.k, layer.v))
    q, k = (apply_rope(part, layer.config.rope) for part in (q, k))
    heads = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
    added = layer.shared.o(heads.permute(1, 3, 0, 2, 4).flatten(2))
    ours, routed = layer(x, x, x, mask), without(x, x, x, mask)
    rows = slice(None) if real is None else real
    torch.testing.assert_close(ours.y[rows], (routed.y + added)[rows], **CLOSE)
    trace = layer(x, x, x, mask, trace=True).trace
    assert layer.num_heads == (3 + 2) * 2
    assert trace.heads.head_ids[..., -4:].unique().tolist() == [6, 7, 8, 9]
    assert trace.heads.summary.entropy.shape[1] == trace.heads.head_ids.shape[2] == (2 + 2) * 2


def test_shared_experts_of_switchhead_heads():
    """As if each head had one more expert, whose gates are always open."""
    layer = layer_of("switchhead", True)
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0)).double()
    y = layer(x, x, x, AttentionMask(True)).y

    def routed(router, experts, rows_BTHi):
        routing = router(x)
        y = torch.zeros(14, 2, experts.d_out, dtype=torch.float64)
        for t in range(14):
            for h in range(2):
                for e, w in zip(routing.topk_ids[t, h], routing.topk_weights[t, h], strict=True):
                    y[t, h] += w * (rows_BTHi.flatten(0, 1)[t, h] @ experts.weight[e])
        return y.view(2, 7, 2, -1)

    v = routed(layer.value_router, layer.v, x[:, :, None].expand(-1, -1, 2, -1))
    v = (v + layer.shared_v(x).view(2, 7, 2, 4)).transpose(1, 2)
    q, k = (
        apply_rope(p(x).view(2, 7, 2, 4).transpose(1, 2), layer.config.rope)
        for p in (layer.q, layer.k)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    expected = routed(layer.output_router, layer.o, heads).sum(2) + layer.shared_o(heads.flatten(2))
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize("attention", SHARED)
@pytest.mark.parametrize("ffn", SHARED_FFN)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_parameter_learns_and_a_cache_changes_nothing(attention, ffn, placement):
    fields = {"attention": SHARED[attention], "ffn": SHARED_FFN[ffn]}
    model, tokens = small_model(**fields, norm_placement=placement), tokens_of(4)
    objective(model, Batch(tokens)).cross_entropy.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-12, name
    first = model(tokens[:, :5], None, model.empty_cache())
    rest = model(tokens[:, 5:], None, first.cache)
    logits = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(logits, model(tokens).logits, **CLOSE)


def test_a_shared_expert_reads_what_experts_read():
    """Under peri-norm the raw residual, and its gate what the router reads."""
    model = small_model(ffn=SHARED_FFN["moe gated"], norm_placement="peri", num_layers=1)
    ffn = model.stack.layers[0].ffn
    x, n = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        ffn.down.weight.zero_()
    gate = (n @ ffn.shared.gate.weight.T).sigmoid()
    torch.testing.assert_close(ffn(x, n, None).y, gate * ffn.shared.ffn(x, n, None).y, **CLOSE)


@pytest.mark.parametrize("attention", SHARED)
def test_they_count_as_dense_and_active(attention):
    config = small_config(attention=SHARED[attention], ffn=SHARED_FFN["moe gated"])
    plain = small_config(attention=ATTENTION[attention], ffn=FFN["moe gated"])
    ours, theirs = count(config, 12), count(plain, 12)
    ffn, gate = 3 * 8 * 6, 8
    heads = {"moa": 2 * 2 * 8 * 8, "switchhead": 2 * 8 * 8}[attention]
    assert ours.experts == theirs.experts
    more = 2 * (ffn + gate + heads)
    work, plain_work = ours.training, theirs.training
    assert ours.total - theirs.total == work.active - plain_work.active == more
    added = {part: work.macs[part] - plain_work.macs[part] for part in work.macs}
    softmax = {"moa": 2 * 2 * 12 * 12 * 2 * 2 * 4, "switchhead": 0}[attention]
    assert added == {
        "projections": 2 * 12 * (ffn + heads),
        "routers": 2 * 12 * gate,
        "softmax": softmax,
        "experts": 0,
        "head": 0,
    }
    model = build_model(config)
    names = {name for name, _ in expert_layers(model)}
    assert not any("shared" in name for name in names)
    roles = parameter_roles(model)
    assert roles["stack.layers.0.ffn.shared.gate.weight"] is Role.ROUTER
    assert roles["stack.layers.0.ffn.shared.ffn.up.weight"] is Role.MATRIX


def test_each_shared_expert_of_moa_is_drawn_as_large_as_a_routed_one():
    config = small_config(attention=SHARED["moa"]).model_dump() | {"d_model": 64}
    layer = build_model(ModelConfig.model_validate(config)).stack.layers[0].attention
    assert isinstance(layer, MoAAttention)
    for ours, routed in ((layer.shared.q, layer.q), (layer.shared.o, layer.o)):
        largest = routed.weight.abs().max().item()
        assert ours.weight.abs().max().item() == pytest.approx(largest, rel=0.05)
