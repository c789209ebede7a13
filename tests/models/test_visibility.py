"""What a position may depend on: earlier real tokens of its own sequence, nothing else."""

import pytest
import torch

from tests.models.small import (
    ATTENTION,
    LENGTH,
    PLACEMENTS,
    VOCABULARY,
    small_model,
    tokens_of,
    with_capacity,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
MASK = torch.arange(LENGTH) < torch.tensor([LENGTH, 5])[:, None]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("padded", [False, True])
def test_later_tokens_do_not_change_earlier_logits(attention, placement, padded):
    model, tokens = small_model(attention=attention, norm_placement=placement), tokens_of()
    mask = MASK if padded else None
    logits = model(tokens, mask).logits
    for position in (1, 4, LENGTH - 1):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % VOCABULARY
        later = model(changed, mask).logits
        torch.testing.assert_close(later[:, :position], logits[:, :position], **CLOSE)
        real = slice(None) if position < 5 or not padded else slice(1)
        assert (later != logits)[real, position].any(-1).all()


def test_dropping_by_position_is_causal():
    """Dropping by probability is not: a later token with a higher score takes the place."""
    model, tokens = small_model(**with_capacity("position")), tokens_of()
    output = model(tokens)
    assert any(s.dropped.any() for s in output.statistics.values())
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed).logits[:, :4], output.logits[:, :4], **CLOSE)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_changes_nothing_for_real_tokens(attention, placement):
    """Each sequence alone and unpadded gives the same, whatever stands at padding."""
    model, tokens = small_model(attention=attention, norm_placement=placement), tokens_of()
    batch = model(tokens, MASK)
    for b, length in enumerate(MASK.sum(1).tolist()):
        alone = model(tokens[b : b + 1, :length])
        torch.testing.assert_close(batch.logits[b, :length], alone.logits[0], **CLOSE)
        for call, statistics in alone.statistics.items():
            for ours, theirs in zip(
                batch.statistics[call].present(), statistics.present(), strict=True
            ):
                torch.testing.assert_close(ours[b], theirs[0], **CLOSE)


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_in_front_and_in_all_of_a_sequence_stays_finite(attention):
    """Queries that see no key at all, in the forward and in the backward."""
    model = small_model(attention=attention)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, :3] = mask[2] = False
    output = model(tokens_of(3), mask)
    assert output.logits.isfinite().all()
    output.logits[mask].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_mask_without_padding_equals_no_mask(attention):
    model, tokens = small_model(attention=attention), tokens_of()
    masked = model(tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(masked.logits, model(tokens).logits, **CLOSE)


@pytest.mark.parametrize("policy", ["probability", "position"])
def test_sequences_of_a_batch_are_independent(policy):
    """Also where experts drop: capacity is counted per sequence."""
    model, tokens = small_model(**with_capacity(policy)), tokens_of(3)
    batch = model(tokens)
    assert any(s.dropped.any() for s in batch.statistics.values())
    for b in range(3):
        alone = model(tokens[b : b + 1]).logits[0]
        torch.testing.assert_close(batch.logits[b], alone, **CLOSE)
