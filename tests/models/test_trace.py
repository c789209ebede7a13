"""A trace says what the layers did, and asking for it changes nothing."""

import pytest
import torch

from moa_dist.models.attention import traced
from moa_dist.models.mask import AttentionMask
from moa_dist.models.softmax import softmax_attention
from tests.models.small import ATTENTION, LENGTH, small_model, tokens_of

PADDED = torch.arange(LENGTH) < torch.tensor([LENGTH, 5])[:, None]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_a_trace_agrees_with_the_statistics(attention, ffn, mask):
    model = small_model(attention=attention, ffn=ffn, num_layers=4, num_distinct_layers=2)
    plain, output = (model(tokens_of(), mask, trace=trace) for trace in (False, True))
    assert plain.traces is None
    torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=0)
    assert list(output.traces) == [(0, 0), (1, 0), (0, 1), (1, 1)], "in the order of application"
    calls = {
        (layer, repeat, router): routing
        for (layer, repeat), trace in output.traces.items()
        for router, routing in trace.routing.items()
    }
    assert calls.keys() == plain.statistics.keys()
    for call, routing in calls.items():
        load = plain.statistics[call].load
        chosen = routing.topk_ids.unflatten(0, (len(load), -1))
        for sequence, counts in enumerate(load):
            real = slice(None) if mask is None else mask[sequence]
            ids = chosen[sequence][real].flatten()
            assert ids.bincount(minlength=counts.numel()).tolist() == counts.flatten().tolist()


def heads(num_heads=3, num_keys=LENGTH, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (2, num_heads, num_keys, width)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_past", [0, 3])
@pytest.mark.parametrize("real", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_are_summarised_by_the_attention_that_they_use(num_past, real, causal):
    q, k = heads()[:, :, num_past:], heads(seed=1)
    mask = AttentionMask(causal, key_mask=real, num_past=num_past)
    identity = torch.eye(LENGTH, dtype=torch.float64).expand(2, 3, -1, -1)
    share = softmax_attention(q, k, identity, mask)  # of identity values, the attention itself
    summary = traced({}, q, k, mask).heads.summary
    for t in range(q.shape[2]):
        own = t + num_past
        row = share[:, :, t]
        distance = sum(row[..., s] * abs(s - own) for s in range(LENGTH))
        torch.testing.assert_close(summary.distance[..., t], distance)
        torch.testing.assert_close(summary.entropy[..., t], torch.special.entr(row).sum(-1))
        torch.testing.assert_close(summary.previous[..., t], row[..., max(own - 1, 0)])
        torch.testing.assert_close(summary.first[..., t], row[..., 0])
        torch.testing.assert_close(summary.itself[..., t], row[..., own])


def test_between_texts_no_attention_beyond_the_shorter():
    """Whether or not padding lets it look longer."""
    q, k = heads(num_keys=6), heads(num_keys=4, seed=1)
    longer = torch.cat([k, heads(num_keys=3, seed=2)], dim=2)
    real = torch.arange(7) < torch.tensor([4, 4])[:, None]
    alone = traced({}, q, k, AttentionMask(causal=False)).heads.summary
    padded = traced({}, q, longer, AttentionMask(causal=False, key_mask=real)).heads.summary
    for value, other in zip(alone, padded, strict=True):
        torch.testing.assert_close(value, other)
    assert alone.itself[..., 4:].eq(0).all()
    assert alone.previous[..., 5:].eq(0).all()
    assert alone.previous[..., :5].gt(0).all()


def test_no_attention_to_keys_without_probability():
    """A key whose score underflows has no part in the entropy."""
    q = torch.full((1, 1, 2, 4), 100.0)
    k = torch.stack([torch.full((4,), -100.0), torch.full((4,), 100.0)])[None, None]
    summary = traced({}, q, k, AttentionMask(causal=True)).heads.summary
    assert summary.entropy.tolist() == [[[0.0, 0.0]]]
    assert summary.itself.tolist() == [[[1.0, 1.0]]]
