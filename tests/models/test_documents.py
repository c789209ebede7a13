"""Documents packed into one sequence are to a model what each of them is alone."""

import pytest
import torch
import torch.nn.functional as F

from moa_dist.kernels.hardware import Hardware
from moa_dist.models import block_attention, documents
from moa_dist.models.documents import Documents, document_attention, flash_fits
from moa_dist.models.objective import Batch, objective
from tests.models.small import ATTENTION, VOCABULARY, small_model

END = 0
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
LENGTHS = ([3, 1, 6, 2], [5, 7], [12])
"""Of the documents of each sequence; the last one of each has no end, as it is cut off."""
OBJECTIVES = ["causal", "masked"]


def packed(seed: int = 0) -> torch.Tensor:
    """[3, 12], without end tokens but where documents end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (len(LENGTHS), 12), generator=generator)
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths[:-1], dtype=torch.int64).cumsum(0) - 1
        tokens[row, ends] = END
    return tokens


def alone(tokens: torch.Tensor) -> list[torch.Tensor]:
    return [d for row, n in zip(tokens, LENGTHS, strict=True) for d in row.split(n)]


def model_of(kind: str, objective: str = "causal", position: str = "rope", **more):
    section = ATTENTION[kind]
    if position == "sinusoidal":
        section, more["position"] = section | {"rope": None}, position
    return small_model(
        attention=section, objective=objective, num_layers=4, num_distinct_layers=2, **more
    )


def test_documents_are_found():
    found = Documents.of(packed(), END)
    assert found.lengths == (3, 1, 6, 2, 5, 7, 12)
    assert found.starts.tolist() == [0, 3, 4, 10, 12, 17, 24, 36]
    assert found.starts.dtype == torch.int32
    assert found.ids[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3]
    assert found.rows(slice(1, 2)).lengths == (5, 7)


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ATTENTION)
def test_logits_equal_those_of_documents_alone(kind, objective, position):
    model, tokens = model_of(kind, objective, position).eval(), packed()
    together = model(tokens, documents=Documents.of(tokens, END)).logits
    expected = torch.cat([model(one[None]).logits[0] for one in alone(tokens)])
    torch.testing.assert_close(together.flatten(0, 1), expected, **CLOSE)
    # Without documents these are other logits, in all but the first of a sequence.
    assert not torch.allclose(model(tokens).logits[0, 3:], together[0, 3:], rtol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind_of_loss", OBJECTIVES)
@pytest.mark.parametrize("kind", ATTENTION)
def test_gradients_equal_the_sum_over_documents(kind, kind_of_loss, recompute):
    model = model_of(kind, kind_of_loss, recompute=recompute).train()
    tokens = packed()
    batch = Batch(tokens, targets=tokens.roll(1, 1)).in_documents(END)
    objective(model, batch).cross_entropy.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for one, targets in zip(alone(tokens), alone(batch.targets), strict=True):
        objective(model, Batch(one[None], targets=targets[None])).cross_entropy.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [4, 1, 1, 6]], ids=str)
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_a_cache_holds_other_documents_too(kind, position, pieces, monkeypatch):
    monkeypatch.setattr(block_attention, "_BLOCK", 4)
    model, tokens = model_of(kind, position=position).eval(), packed()
    cache, logits, read = model.empty_cache(), [], 0
    for piece in tokens.split(pieces, dim=1):
        read += piece.shape[1]
        output = model(piece, None, cache, documents=Documents.of(tokens[:, :read], END))
        cache = output.cache
        logits.append(output.logits)
    expected = torch.cat([model(one[None]).logits[0] for one in alone(tokens)])
    torch.testing.assert_close(torch.cat(logits, 1).flatten(0, 1), expected, **CLOSE)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ATTENTION)
def test_padding_is_in_no_document(kind, cached):
    """In front and behind, also where it looks like an end token."""
    model, tokens = model_of(kind).eval(), packed()
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :4], real[1, 9:], real[2] = False, False, False
    tokens[~real] = END
    pieces = [5, 7] if cached else [12]
    cache = model.empty_cache() if cached else None
    logits, read = [], 0
    for piece, mask in zip(tokens.split(pieces, 1), real.split(pieces, 1), strict=True):
        read += piece.shape[1]
        found = Documents.of(tokens[:, :read], END, real[:, :read])
        output = model(piece, mask, cache, documents=found)
        cache = output.cache
        logits.append(output.logits)
    row0, row1 = ([0, 0, 6, 2], [5, 4])
    expected = [tokens[0, 4:10], tokens[0, 10:], tokens[1, :5], tokens[1, 5:9]]
    assert sum(row0) + sum(row1) == sum(map(len, expected)) == real.sum()
    expected = torch.cat([model(one[None]).logits[0] for one in expected])
    torch.testing.assert_close(torch.cat(logits, 1)[real], expected, **CLOSE)


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_trace_sees_what_the_model_sees(kind):
    model, tokens = model_of(kind).eval(), packed()
    traces = model(tokens, documents=Documents.of(tokens, END), trace=True).traces
    for trace in traces.values():
        summary = trace.heads["attention"].summary
        # The first token of a document sees itself alone.
        assert torch.equal(summary.itself[1, :, 5], torch.ones_like(summary.itself[1, :, 5]))
        assert torch.equal(summary.first[1, :, 6], summary.previous[1, :, 6])
        assert torch.equal(summary.first[1, :, 5], summary.itself[1, :, 5])


def test_documents_must_fit_the_tokens_and_the_objective():
    tokens = packed()
    model = model_of("dense").eval()
    with pytest.raises(ValueError, match="documents"):
        model(tokens[:, :5], documents=Documents.of(tokens, END))
    cache = model(tokens[:, :5], None, model.empty_cache()).cache
    with pytest.raises(ValueError, match="documents"):
        model(tokens[:, 5:], None, cache, documents=Documents.of(tokens[:, 5:], END))
    translating = small_model(objective="translation").eval()
    with pytest.raises(ValueError, match="documents"):
        translating(tokens, source=tokens, documents=Documents.of(tokens, END))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("d_head", [8, 10])
def test_flash_attention_is_called_as_it_computes(d_head, causal, monkeypatch):
    """With heads that share keys, and of a width that it does not take."""

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert q.shape[-1] % 8 == 0
        assert cu_q is cu_k
        assert max_q == max_k == int(cu_q.diff().max())
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        assert enable_gqa
        heads = [
            F.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in (q, k, v)),
                is_causal=window_size == (-1, 0),
                scale=scale,
            ).transpose(0, 1)
            for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)
        ]
        return torch.cat(heads)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, h, 12, d_head, dtype=torch.float64, generator=generator) for h in (4, 2, 2)
    )
    found = Documents.of(packed(), END)
    expected = document_attention(q, k, v, found, causal=causal)
    monkeypatch.setattr(documents, "varlen_attn", flash)
    monkeypatch.setattr(documents, "flash_fits", lambda *_: True)
    torch.testing.assert_close(document_attention(q, k, v, found, causal=causal), expected, **CLOSE)


def test_flash_attention_is_chosen_where_it_runs():
    hopper = Hardware("cuda", capability=(9, 0))
    assert flash_fits(hopper, torch.bfloat16, 128)
    assert not flash_fits(hopper, torch.float32, 128)
    assert not flash_fits(hopper, torch.bfloat16, 512)
    assert not flash_fits(Hardware("cuda", capability=(7, 5)), torch.float16, 128)
    assert not flash_fits(Hardware("cpu"), torch.bfloat16, 128)
