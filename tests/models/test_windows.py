"""Queries that see a window only, and capped logits: by blocks, with caches, padding, documents."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from moa_dist.models import block_attention, documents, softmax
from moa_dist.models.block_attention import attention_by_blocks
from moa_dist.models.counts import count
from moa_dist.models.documents import Documents
from moa_dist.models.mask import AttentionMask
from moa_dist.models.padding import Runs
from moa_dist.models.softmax import softmax_attention
from tests.models.small import ATTENTION, VOCABULARY, small_config, small_model, tokens_of

B, T, S, d = 2, 11, 11, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
PADDING = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 9 + [0] * 2]).bool()
DOCUMENTS = Documents.from_ids(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2], [0] * 11]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_attention, "_BLOCK", 4)


def expected_heads(q, k, v, mask: AttentionMask, soft_cap: float | None) -> torch.Tensor:
    """One query at a time, by the definition."""
    heads = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for b, h, t in product(range(len(q)), range(q.shape[1]), range(q.shape[2])):
        place = mask.num_past + t
        real = torch.ones(k.shape[2]).bool() if mask.key_mask is None else mask.key_mask[b]
        keys = []
        for s in range(k.shape[2]):
            between = real[min(s, place) : max(s, place)].sum()
            if mask.documents is not None:
                between = abs(s - place)
            if (
                (mask.causal and s > place)
                or not real[s]
                or (mask.window is not None and between >= mask.window)
                or (mask.documents and mask.documents.ids[b, s] != mask.documents.ids[b, place])
            ):
                continue
            keys.append(s)
        keys = keys or list(range(k.shape[2]))
        logits = k[b, h // share, keys] @ q[b, h, t] / math.sqrt(d)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        heads[b, h, t] = logits.softmax(0) @ v[b, h // share, keys]
    return heads


def operands(num_queries: int = T) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, 4, num_queries, d), (B, 2, S, d), (B, 2, S, d)
    return tuple(
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    )


SEEN = {
    "all": {},
    "padding": {"key_mask": PADDING},
    "documents": {"documents": DOCUMENTS},
}


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_equal_the_definition(causal, seen, window, soft_cap):
    """Heads and all gradients. Rows of padding may hold anything."""
    q, k, v = operands()
    mask = AttentionMask(causal, **SEEN[seen], window=window)
    expected = expected_heads(q, k, v, mask, soft_cap)
    real = mask.key_mask[:, None, :, None] if seen == "padding" else torch.ones(1).bool()
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad(expected, (q, k, v), upstream * real)
    for ours in (softmax_attention, attention_by_blocks):
        heads = ours(q, k, v, mask, soft_cap)
        torch.testing.assert_close(heads * real, expected * real, **CLOSE)
        found = torch.autograd.grad(heads, (q, k, v), upstream * real)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("num_queries", [1, 6])
def test_blocks_after_a_cache(num_queries, seen, window, soft_cap):
    q, k, v = operands(num_queries)
    mask = AttentionMask(True, **SEEN[seen], num_past=S - num_queries, window=window)
    expected = expected_heads(q, k, v, mask, soft_cap)
    real = torch.ones(1).bool()
    if seen == "padding":
        real = PADDING[:, None, S - num_queries :, None]
    heads = softmax_attention(q, k, v, mask, soft_cap)
    torch.testing.assert_close(heads * real, expected * real, **CLOSE)


def test_autocast_narrows_both_passes():
    q, k, v = (x.detach().float().requires_grad_() for x in operands())
    mask = AttentionMask(True, window=3)
    with torch.autocast("cpu", torch.bfloat16):
        heads = softmax_attention(q, k, v.bfloat16(), mask, 0.7)
    assert heads.dtype == torch.bfloat16
    exact = softmax_attention(q, k, v, mask, 0.7)
    torch.testing.assert_close(heads.float(), exact, rtol=0, atol=0.05)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.float().sum(), (q, k)) for x in (heads, exact)), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


def test_a_cap_within_texts_of_two_lengths():
    """As in the attention of a decoder to its source."""
    q, k, v = operands(5)
    mask = AttentionMask(False, key_mask=PADDING)
    expected = expected_heads(q, k, v, mask, 0.7)
    torch.testing.assert_close(softmax_attention(q, k, v, mask, 0.7), expected, **CLOSE)


def test_nothing_of_two_sequence_lengths_is_kept_or_made(monkeypatch):
    """Neither a mask nor logits of all pairs of tokens, in both passes."""
    monkeypatch.setattr(block_attention, "_BLOCK", 16)
    length, largest, kept = 256, [], {}
    q, k, v = (torch.randn(1, 1, length, 2).requires_grad_() for _ in range(3))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.numel()
        return x

    for window, soft_cap in ((8, None), (None, 1.0)):
        with Largest(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            heads = softmax_attention(q, k, v, AttentionMask(True, window=window), soft_cap)
            heads.sum().backward()
        assert max(largest) <= 16 * length
        assert sum(kept.values()) == 4 * length * 2
        kept.clear()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_is_called_with_the_window(causal, packed, monkeypatch):
    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (2, 0 if causal else 2)
        assert enable_gqa
        assert max_q == int(cu_q.diff().max())
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        heads = []
        for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            visible = (distance <= window_size[0]) & (distance >= -window_size[1])
            parts = (x[a:b].transpose(0, 1) for x in (q, k, v))
            heads.append(F.scaled_dot_product_attention(*parts, visible, scale=scale))
        return torch.cat([x.transpose(0, 1) for x in heads])

    q, k, v = operands()
    mask = AttentionMask(causal, documents=DOCUMENTS if packed else None, window=3)
    expected = softmax_attention(q, k, v, mask)
    monkeypatch.setattr(documents, "varlen_attn", flash)
    monkeypatch.setattr(softmax, "flash_takes", lambda _: True)
    torch.testing.assert_close(softmax_attention(q, k, v, mask), expected, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_around_texts_within_windows(causal, monkeypatch):
    """Flash attention over runs of tokens takes causal windows; others go by blocks."""

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert causal
        assert torch.equal(cu_q, cu_k)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        place = torch.arange(len(q))
        run = (place[:, None] >= cu_q[1:]).sum(1)
        distance = place[:, None] - place
        visible = (distance >= 0) & (distance <= window_size[0]) & (run[:, None] == run)
        parts = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, visible, scale=scale).transpose(0, 1)

    q, k, v = operands()
    real = torch.tensor([[0, 0] + [1] * 9, [1] * 8 + [0] * 3]).bool()
    mask = AttentionMask(causal, real, real, window=3)
    expected = softmax_attention(q, k, v, mask)
    monkeypatch.setattr(documents, "varlen_attn", flash)
    heads = softmax_attention(q, k, v, mask._replace(runs=Runs.of(real, T, causal=causal)))
    torch.testing.assert_close(
        heads * real[:, None, :, None], expected * real[:, None, :, None], **CLOSE
    )


# Models.

LOCAL = {"window": {"size": 3, "full_every": 2}, "soft_cap": 2.0, "rope": {"fraction": 1.0}}


def model_of(attention: str, **more):
    """Two shared layers, applied twice: layer 1 sees all in both repeats, unless `more` differs."""
    section = ATTENTION[attention] | LOCAL | more.pop("attention_fields", {})
    return small_model(attention=section, num_layers=4, num_distinct_layers=2, **more).eval()


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5]], ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
def test_caches_and_padding_change_nothing(attention, pieces):
    """Padding anywhere does not count, so each text equals itself alone, also with a cache."""
    model, tokens = model_of(attention), tokens_of(3, 12)
    real = torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1]]).bool()
    together = model(tokens, real).logits
    cache, logits = model.empty_cache(), []
    for piece, mask in zip(tokens.split(pieces, 1), real.split(pieces, 1), strict=True):
        output = model(piece, mask, cache)
        cache = output.cache
        logits.append(output.logits)
    cached = torch.cat(logits, 1)
    for b in range(3):
        alone = model(tokens[b : b + 1, real[b]]).logits[0]
        torch.testing.assert_close(together[b, real[b]], alone, **CLOSE)
        torch.testing.assert_close(cached[b, real[b]], alone, **CLOSE)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_documents_equal_themselves_alone(attention, cached):
    model, tokens = model_of(attention), tokens_of(1, 12) % (VOCABULARY - 1) + 1
    tokens[0, 6] = 0
    cache = model.empty_cache() if cached else None
    logits, read = [], 0
    for piece in tokens.split([8, 4] if cached else [12], 1):
        read += piece.shape[1]
        output = model(piece, None, cache, documents=Documents.of(tokens[:, :read], 0))
        cache = output.cache
        logits.append(output.logits)
    alone = torch.cat([model(part).logits for part in tokens.split([7, 5], 1)], 1)
    torch.testing.assert_close(torch.cat(logits, 1), alone, **CLOSE)


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_how_far_a_token_is_seen(attention, objective):
    """Each application of a layer with a window reaches size - 1 tokens further."""
    fields = {"attention_fields": {"window": {"size": 3}}, "objective": objective}
    model, tokens = model_of(attention, **fields), tokens_of(1, 16)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCABULARY
    moved = (model(changed).logits != model(tokens).logits).any(-1)[0]
    reach = 4 * (3 - 1)
    assert moved[5 : 5 + reach].all()
    assert not moved[5 + reach + 1 :].any()
    assert moved[:5].all() if objective == "masked" else not moved[:5].any()


@pytest.mark.parametrize("attention", ATTENTION)
def test_applications_that_see_all_are_every_nth(attention):
    """Of three layers applied twice: the 4th, hence layer 0 in its second repeat only."""
    fields = {"window": {"size": 2, "full_every": 4}}
    section = ATTENTION[attention] | fields
    model = small_model(attention=section, num_layers=6, num_distinct_layers=3).eval()
    traces = model(tokens_of(1, 12), trace=True).traces
    farthest = {
        call: trace.heads["attention"].summary.distance.max().item()
        for call, trace in traces.items()
    }
    assert [call for call, distance in farthest.items() if distance > 1] == [(0, 1)]


def test_full_layers_may_go_without_rotations():
    """Positions then come from layers with a window alone."""
    window = {"size": 3, "full_every": 2, "rope": {"fraction": 1.0}}
    fields = {"attention_fields": {"window": window, "rope": None}}
    model, tokens = model_of("dense", **fields), tokens_of(2, 12)
    cache = model(tokens[:, :5], None, model.empty_cache()).cache
    rest = model(tokens[:, 5:], None, cache).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 5:], **CLOSE)
    without = model_of("dense", attention_fields={"rope": None})
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(without(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("objective", ["causal", "masked", "translation"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_work_within_windows(attention, objective):
    """Three of four layers see 3 tokens, or 5 in both directions."""
    section = ATTENTION[attention]
    local = section | {"window": {"size": 3, "full_every": 4}}
    plain, limited = (
        count(small_config(attention=a, num_layers=4, objective=objective), 12).training.macs
        for a in (section, local)
    )
    alone = small_model(attention=section).stack.layers[0].attention
    per_key = alone.macs(12, training=True)["softmax"] // 12
    seen = {"causal": [3, 3, 3, 12], "masked": [5, 5, 5, 12]}
    # Encoder, decoder, and the decoder's attention to the source.
    seen["translation"] = seen["causal"] + seen["masked"] + [12] * 4
    assert limited["softmax"] == per_key * sum(seen[objective])
    assert {**limited, "softmax": 0} == {**plain, "softmax": 0}


@pytest.mark.parametrize("attention", ATTENTION)
def test_translation_with_windows_and_caps(attention):
    model = model_of(attention, objective="translation")
    source, tokens = tokens_of(2, 9, seed=1), tokens_of(2, 12)
    whole = model(tokens, source=source).logits
    first = model(tokens[:, :5], None, model.empty_cache(), source)
    rest = model(tokens[:, 5:], None, first.cache).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, **CLOSE)
