"""Attention kinds against their equations, one token, head and expert at a time; and rotation."""

import math

import pytest
import torch
import torch.nn.functional as F

from moa_dist.config.attention import MoAConfig, SwitchHeadConfig
from moa_dist.config.positions import RopeConfig
from moa_dist.models import rope_kernel
from moa_dist.models.mask import AttentionMask
from moa_dist.models.moa import MoAAttention
from moa_dist.models.rope import Rotation, apply_rope, rotated_width
from moa_dist.models.switchhead import SwitchHeadAttention
from moa_dist.moe.initialize import initialize
from tests.models.small import router
from tests.moe.routings import draw

B, T, S, D, d = 2, 5, 7, 6, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def rotate(vector: torch.Tensor, position: int, rope: RopeConfig | None) -> torch.Tensor:
    """By complex numbers: dimension i turns with dimension i + width / 2."""
    if rope is None:
        return vector
    half = int(len(vector) * rope.fraction) // 2
    frequency = rope.base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(vector[:half], vector[half : 2 * half]) * torch.polar(
        torch.ones_like(frequency), position * frequency
    )
    return torch.cat([turned.real, turned.imag, vector[2 * half :]])


def attend(q, t, keys, values, rope, causal) -> torch.Tensor:
    """One query vector at position t over key and value vectors."""
    visible = range(t + 1 if causal else len(keys))
    q = rotate(q, t, rope)
    logits = torch.stack([q @ rotate(keys[s], s, rope) / math.sqrt(len(q)) for s in visible])
    return logits.softmax(0) @ torch.stack([values[s] for s in visible])


def chosen(logits: torch.Tensor, config) -> list[tuple[int, torch.Tensor]]:
    """Expert and weight of each slot, raw gates."""
    scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
    return [(e, scores[e]) for e in scores.topk(config.top_k).indices.tolist()]


def inputs(causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value inputs; three different ones for cross-attention."""
    length = T if causal else S
    return draw(B, T, D), draw(B, length, D, seed=1), draw(B, length, D, seed=2)


@pytest.mark.parametrize("causal", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("rope", [RopeConfig(), None], ids=["rope", "no rope"])
@pytest.mark.parametrize("heads_per_expert", [1, 2, 3])
def test_moa_equals_its_equations(causal, rope, heads_per_expert):
    """With several heads per expert, head h of every slot meets key and value head h."""
    config = MoAConfig.model_validate(
        {
            "d_head": d,
            "heads_per_expert": heads_per_expert,
            "rope": rope,
            "router": router(5, 2, "softmax"),
        }
    )
    layer = MoAAttention(config, D, init_scale=1.0)
    initialize(layer, seed=0)
    layer.double()
    query, key, value = inputs(causal)
    y = layer(query, key, value, AttentionMask(causal)).y

    heads = [slice(h * d, (h + 1) * d) for h in range(heads_per_expert)]
    for b in range(B):
        keys, values = layer.k(key[b]), layer.v(value[b])
        for t in range(T):
            expected = torch.zeros(D, dtype=torch.float64)
            for e, weight in chosen(layer.router.logits(query[b, t][None])[0], config.router):
                q = query[b, t] @ layer.q.weight[e]
                out = [attend(q[h], t, keys[:, h], values[:, h], rope, causal) for h in heads]
                expected = expected + weight * torch.cat(out) @ layer.o.weight[e]
            torch.testing.assert_close(y[b, t], expected, **CLOSE)


@pytest.mark.parametrize("gate", ["raw", "renormalized"])
def test_moa_of_equal_experts_is_multi_query_attention(gate):
    """All experts chosen: their weights sum to one."""
    config = MoAConfig.model_validate(
        {"d_head": d, "rope": None, "router": router(4, 4, "softmax", gate=gate)}
    )
    layer = MoAAttention(config, D, init_scale=1.0)
    initialize(layer, seed=0)
    layer.double()
    with torch.no_grad():
        for experts in (layer.q.weight, layer.o.weight):
            experts.copy_(experts[:1].expand_as(experts).clone())
    x = draw(B, T, D)
    q, k, v = x @ layer.q.weight[0], layer.k(x), layer.v(x)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True) @ layer.o.weight[0]
    torch.testing.assert_close(layer(x, x, x, AttentionMask(True)).y, expected, **CLOSE)


def make_switchhead(num_heads: int, num_experts: int, top_k: int, rope) -> SwitchHeadAttention:
    config = SwitchHeadConfig.model_validate(
        {"num_heads": num_heads, "d_head": d, "rope": rope, "router": router(num_experts, top_k)}
    )
    layer = SwitchHeadAttention(config, D, init_scale=1.0)
    initialize(layer, seed=0)
    return layer.double()


@pytest.mark.parametrize("causal", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("rope", [RopeConfig(), None], ids=["rope", "no rope"])
@pytest.mark.parametrize(("H", "E", "K"), [(1, 3, 2), (2, 3, 2), (3, 2, 2), (2, 1, 1)])
def test_switchhead_equals_its_equations(causal, rope, H, E, K):
    """Values are routed by the key side, outputs by the query side; flat expert h * E + e."""
    layer = make_switchhead(H, E, K, rope)
    query, key, value = inputs(causal)
    y = layer(query, key, value, AttentionMask(causal)).y

    config = layer.config.router
    for b in range(B):
        expected = torch.zeros(T, D, dtype=torch.float64)
        for h in range(H):
            head, experts = slice(h * d, (h + 1) * d), slice(h * E, (h + 1) * E)
            queries, keys = layer.q(query[b])[:, head], layer.k(key[b])[:, head]
            values = [
                sum(
                    weight * value[b, s] @ layer.v.weight[h * E + e]
                    for e, weight in chosen(logits[experts], config)
                )
                for s, logits in enumerate(layer.value_router.logits(key[b]))
            ]
            for t, logits in enumerate(layer.output_router.logits(query[b])):
                out = attend(queries[t], t, keys, values, rope, causal)
                for e, weight in chosen(logits[experts], config):
                    expected[t] += weight * out @ layer.o.weight[h * E + e]
        torch.testing.assert_close(y[b], expected, **CLOSE)


def test_switchhead_of_one_expert_is_dense_attention_with_gates():
    layer, x = make_switchhead(2, 1, 1, None), draw(B, T, D)
    gate_v, gate_o = (r.logits(x).sigmoid() for r in (layer.value_router, layer.output_router))
    q, k = (p(x).unflatten(-1, (2, d)).transpose(1, 2) for p in (layer.q, layer.k))
    v = torch.einsum("bsd,hdf->bhsf", x, layer.v.weight) * gate_v.mT[..., None]
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True) * gate_o.mT[..., None]
    expected = torch.einsum("bhtf,hfd->btd", heads, layer.o.weight)
    torch.testing.assert_close(layer(x, x, x, AttentionMask(True)).y, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["moa", "switchhead"])
def test_output_is_zero_at_padding(kind):
    if kind == "moa":
        config = MoAConfig.model_validate({"d_head": d, "router": router(5, 2, "softmax")})
        layer = MoAAttention(config, D, init_scale=1.0)
        initialize(layer, seed=0)
        layer.double()
    else:
        layer = make_switchhead(2, 3, 2, RopeConfig())
    mask = torch.arange(T) < torch.tensor([T, 2])[:, None]
    x = draw(B, T, D)
    y = layer(x, x, x, AttentionMask(True, mask, mask)).y
    assert y[mask].any(-1).all()
    assert not y[~mask].any()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotated_products_depend_on_distance_only(fraction):
    q, k = (draw(1, 8, seed=seed).expand(9, 8) for seed in (0, 1))
    rope = RopeConfig(fraction=fraction)
    products = apply_rope(q, rope) @ apply_rope(k, rope).T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **CLOSE)
    assert products[0].unique().numel() == 9
    torch.testing.assert_close(products[0, 0], q[0] @ k[0], **CLOSE)


@pytest.mark.parametrize("width", [8, 9, 10])
def test_rotation_turns_pairs_and_leaves_the_rest(width):
    rope, x = RopeConfig(fraction=0.8), draw(3, 6, width)
    rotated, turned = apply_rope(x, rope), rotated_width(width, rope)
    assert torch.equal(rotated[..., turned:], x[..., turned:])
    assert torch.equal(rotated[:, 0], x[:, 0])
    assert (rotated != x)[:, 1:, :turned].any(-1).all()
    for n, t in ((0, 3), (2, 5)):
        torch.testing.assert_close(rotated[n, t], rotate(x[n, t], t, rope), **CLOSE)


@pytest.mark.parametrize(
    ("d_head", "fraction", "width"),
    [
        (82, 0.5, 40),  # 41 is odd: MoEUT 44M
        (64, 0.5, 32),
        (64, 1.0, 64),
        (5, 1.0, 4),
        (1, 1.0, 0),
        (100, 0.58, 58),  # 57.99999999999999 in floating point
    ],
)
def test_rotated_width_is_even(d_head, fraction, width):
    rope = RopeConfig(fraction=fraction)
    assert rotated_width(d_head, rope) == width
    assert apply_rope(draw(3, d_head), rope).shape == (3, d_head)


def test_bfloat16_positions_are_computed_in_fp32():
    """In bfloat16 positions beyond 256 would coincide."""
    x = torch.ones(1025, 4, dtype=torch.bfloat16)
    rotated = apply_rope(x, RopeConfig(fraction=1.0))
    assert rotated.dtype == torch.bfloat16
    exact = apply_rope(x.float(), RopeConfig(fraction=1.0))
    torch.testing.assert_close(rotated.float(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("layout", ["token-major", "head-major"])
@pytest.mark.parametrize(("width", "fraction"), [(8, 1.0), (10, 0.8), (6, 0.4)])
def test_the_kernel_of_rotations(width, fraction, layout):
    """In Triton's interpreter, forward and back, with positions of each sequence or of all."""
    config = RopeConfig(fraction=fraction)
    x = draw(2, 5, 3, width).float()
    x = x.transpose(1, 2) if layout == "token-major" else x.transpose(1, 2).contiguous()
    for position in (torch.arange(5)[None], torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])):
        rotation = Rotation.at(position, width, config, torch.float32)
        ours = rope_kernel.rotate(x, *rotation, back=False)
        assert ours.stride() == x.stride()
        torch.testing.assert_close(ours, apply_rope(x, config, rotation))
        torch.testing.assert_close(rope_kernel.rotate(ours, *rotation, back=True), x)
