"""Flash attention over runs of tokens is attention with a mask, at every real token."""

import pytest
import torch
import torch.nn.functional as F

from moa_dist.models import documents, padding
from moa_dist.models.objective import Batch, objective
from moa_dist.models.padding import Runs, padded_attention
from tests.models.small import ATTENTION, VOCABULARY, small_model

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
LENGTH = 12
TEXTS = ((0, 12), (0, 5), (4, 12), (3, 9), (7, 8))
"""First token and end of the text in each sequence."""
OBJECTIVES = ["causal", "masked", "translation"]


def mask_of(texts=TEXTS):
    place = torch.arange(LENGTH)
    return torch.stack([(place >= first) & (place < end) for first, end in texts])


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Compute what flash attention does, a run at a time; runs without keys give zeros."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) == len(k)
    heads = []
    for a, b, c, d in zip(*(x.tolist() for x in (cu_q, cu_q[1:], cu_k, cu_k[1:])), strict=False):
        causal = window_size == (-1, 0)
        assert not causal or (a, b) == (c, d)
        one = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
        if c == d:
            heads.append(torch.zeros_like(q[a:b]))
        else:
            run = F.scaled_dot_product_attention(
                *one, is_causal=causal, scale=scale, enable_gqa=enable_gqa
            )
            heads.append(run[0].transpose(0, 1))
    return torch.cat(heads)


@pytest.fixture
def calls(monkeypatch):
    """Let a CPU attend as a GPU does; yields what says how often it did."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        return varlen(*args, **kwargs)

    monkeypatch.setattr(documents, "varlen_attn", called)
    monkeypatch.setattr(padding, "flash_fits", lambda *_: True)
    return calls


def batch_of(objective):
    generator = torch.Generator().manual_seed(0)
    mask = mask_of()
    tokens, source = (
        torch.randint(VOCABULARY, (len(TEXTS), LENGTH), generator=generator) for _ in range(2)
    )
    targets = tokens.roll(1, 1).where(mask, -100)
    if objective == "translation":
        return Batch(tokens, mask, targets, source, mask.flip(0))
    return Batch(tokens, mask, targets)


def run(kind, kind_of_loss, recompute=False):
    model = small_model(
        attention=ATTENTION[kind],
        objective=kind_of_loss,
        num_layers=4,
        num_distinct_layers=2,
        recompute=recompute,
    ).train()
    batch = batch_of(kind_of_loss)
    logits = model(*batch.inputs()).logits[batch.token_mask]
    objective(model, batch).cross_entropy.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind_of_loss", OBJECTIVES)
@pytest.mark.parametrize("kind", ATTENTION)
def test_logits_and_gradients_are_those_with_a_mask(kind, kind_of_loss, recompute, request):
    logits, grads = run(kind, kind_of_loss, recompute)
    calls = request.getfixturevalue("calls")
    found, found_grads = run(kind, kind_of_loss, recompute)
    assert calls
    torch.testing.assert_close(found, logits, **CLOSE)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, **CLOSE, msg=name)


def test_runs_cover_all_tokens():
    mask = mask_of(((0, 5), (4, 12), (0, 0)))
    apart = Runs.of(mask, LENGTH, causal=True)
    assert apart.keys.tolist() == [0, 0, 5, 12, 16, 24, 24, 24, 24, 36]
    assert apart.queries is apart.keys
    together = Runs.of(mask, 3, causal=False)
    assert torch.equal(together.keys, apart.keys)
    assert together.queries.tolist() == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9]


def test_padding_within_a_text_is_refused():
    mask = mask_of()
    mask[0, 3] = False
    with pytest.raises(RuntimeError, match="padding"):
        Runs.of(mask, LENGTH, causal=True)


def test_a_text_with_a_cache_has_its_mask(calls):
    """Earlier texts and new ones are no single run."""
    model = small_model(objective="causal").eval()
    tokens, mask = batch_of("causal")[:2]
    cache = model(tokens[:, :5], mask[:, :5], model.empty_cache()).cache
    num_calls = len(calls)
    assert num_calls
    model(tokens[:, 5:], mask[:, 5:], cache)
    assert len(calls) == num_calls


def test_it_compiles_as_one_graph():
    """On tensors without memory, as a CPU has no such kernel."""
    runs = Runs.of(mask_of().to("meta"), LENGTH, causal=False)
    q = torch.empty(len(TEXTS), 2, LENGTH, 8, dtype=torch.bfloat16, device="meta")
    compiled = torch.compile(padded_attention, fullgraph=True, backend="aot_eager")
    y = compiled(q.requires_grad_(), q, q, runs, causal=False)
    y.sum().backward()
    assert y.shape == q.grad.shape == q.shape
