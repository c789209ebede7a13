"""Reading a text piece by piece, with a cache, gives the logits of reading it at once."""

import pytest
import torch

from moa_dist.models.calls import RouterCall
from moa_dist.models.language_model import dropless
from tests.models.small import (
    ATTENTION,
    FFN,
    LENGTH,
    PLACEMENTS,
    router,
    small_model,
    tokens_of,
    with_capacity,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
PIECES = {"one": [LENGTH], "token by token": [1] * LENGTH, "prompt and tokens": [5, 1, 1, 1]}
PIECES["several"] = [2, 3, 1, 2]


def model_of(attention: str, position: str, **more):
    """Shared layers: two, each applied twice."""
    section = ATTENTION[attention]
    if position == "sinusoidal":
        section = section | {"rope": None}
        more["position"] = "sinusoidal"
    return small_model(attention=section, num_layers=4, num_distinct_layers=2, **more).eval()


def read(model, tokens, lengths, real=None):
    """Logits of all pieces, and the last cache."""
    cache, logits = model.empty_cache(), []
    reals = [None] * len(lengths) if real is None else real.split(lengths, dim=1)
    for piece, piece_real in zip(tokens.split(lengths, dim=1), reals, strict=True):
        output = model(piece, piece_real, cache)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_logits_equal_those_of_one_forward(attention, placement, position, pieces):
    model, tokens = model_of(attention, position, norm_placement=placement), tokens_of()
    logits, cache = read(model, tokens, PIECES[pieces])
    torch.testing.assert_close(logits, model(tokens).logits, **CLOSE)
    assert cache.length == LENGTH
    assert [k.shape[2] for k, _ in cache.layers] == [LENGTH] * 4  # one per application
    assert cache.token_mask is None


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_anywhere_changes_nothing(attention, position, pieces):
    """In front, between prompt and continuation, behind: each text equals itself alone."""
    model, tokens = model_of(attention, position), tokens_of(4)
    real = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [1, 1, 0, 0, 0, 1, 0, 1], [1] * 4 + [0] * 4])
    real = real.bool()
    logits, cache = read(model, tokens, PIECES[pieces], real)
    together = model(tokens, real).logits
    assert torch.equal(cache.token_mask, real)
    for b in range(4):
        alone = model(tokens[b : b + 1, real[b]]).logits[0]
        torch.testing.assert_close(logits[b, real[b]], alone, **CLOSE)
        torch.testing.assert_close(together[b, real[b]], alone, **CLOSE)


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_may_end_or_begin_with_a_piece(attention):
    """A mask may come with some pieces and not with others."""
    model, tokens = model_of(attention, "rope"), tokens_of(2)
    padded = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    for lengths, reals in (([3, 1, 4], [padded, None, None]), ([4, 3, 1], [None, padded, None])):
        cache, logits = model.empty_cache(), []
        for piece, real in zip(tokens.split(lengths, dim=1), reals, strict=True):
            output = model(piece, real, cache)
            cache = output.cache
            logits.append(output.logits)
        torch.testing.assert_close(
            torch.cat(logits, dim=1)[cache.token_mask],
            torch.cat([model(tokens[b : b + 1, cache.token_mask[b]]).logits[0] for b in range(2)]),
            **CLOSE,
        )


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_is_not_routed(attention):
    model, real = model_of(attention, "rope"), torch.tensor([[True, True], [False, True]])
    cache = model(tokens_of(2, 3), None, model.empty_cache()).cache
    output = model(tokens_of(2, 2), real, cache)
    assert output.statistics.keys() >= {RouterCall(1, 1, "ffn")}
    for statistics in output.statistics.values():
        assert statistics.num_tokens.tolist() == [2, 1]


def test_a_cache_is_a_value():
    """Two continuations of one text do not see each other."""
    model, tokens = model_of("switchhead", "rope"), tokens_of(3)
    start = model(tokens[:1, :5], None, model.empty_cache()).cache
    for b in (1, 2):
        text = torch.cat([tokens[:1, :5], tokens[b : b + 1, 5:]], dim=1)
        logits = model(text[:, 5:], None, start).logits
        torch.testing.assert_close(logits, model(text).logits[:, 5:], **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
def test_sequences_of_a_cache_are_chosen(padded):
    """As when some texts have ended, or several continue one."""
    model, tokens = model_of("moa", "sinusoidal"), tokens_of(3)
    real = torch.ones(3, 5, dtype=torch.bool)
    real[2, :2] = False
    cache = model(tokens[:, :5], real if padded else None, model.empty_cache()).cache
    rows = torch.tensor([2, 0, 2])
    logits = model(tokens[rows, 5:], None, cache.select(rows)).logits
    expected = model(tokens[:, 5:], None, cache).logits[rows]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_without_a_cache_none_is_kept():
    """Training would hold its tensors until the backward."""
    output = model_of("dense", "rope")(tokens_of())
    assert output.cache is None


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_capacity_needs_a_dropless_model(policy):
    model = small_model(**with_capacity(policy), num_layers=4, num_distinct_layers=2).eval()
    with pytest.raises(ValueError, match=r"use dropless\(model\)"):
        model(tokens_of(), None, model.empty_cache())
    free, tokens = dropless(model), tokens_of()
    logits, _ = read(free, tokens, PIECES["several"])
    output = free(tokens)
    torch.testing.assert_close(logits, output.logits, **CLOSE)
    assert not any(s.dropped.any() for s in output.statistics.values())
    assert any(s.dropped.any() for s in model(tokens).statistics.values())


def test_dropless_shares_the_weights_and_groups_nothing():
    section = {"ffn": FFN["moe"] | {"router": router(4, 2, group_sequences=2)}}
    model = small_model(**section).eval()
    free = dropless(model)
    for ours, theirs in zip(free.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert not free.training
    assert free(tokens_of(3)).logits.isfinite().all()
    assert dropless(free) is free
