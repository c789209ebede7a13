"""Encoder and decoder: what each position may depend on, padding, cached decoding, counts."""

import pytest
import torch
import torch.nn.functional as F

from moa_dist.models.calls import RouterCall
from moa_dist.models.counts import count
from moa_dist.models.language_model import dropless
from moa_dist.models.objective import Batch, objective
from tests.models.small import (
    ATTENTION,
    LENGTH,
    PLACEMENTS,
    VOCABULARY,
    small_config,
    small_model,
    tokens_of,
    with_capacity,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
REAL = torch.arange(LENGTH) < torch.tensor([LENGTH, 5])[:, None]
SOURCE_REAL = torch.arange(6) < torch.tensor([4, 6])[:, None]


def model_of(attention="moa", **more):
    fields = {"position": "sinusoidal", "objective": "translation", "tie_embeddings": True}
    return small_model(attention=attention, **(fields | more))


def texts():
    return tokens_of(), tokens_of(2, 6, seed=1)


def changed(tokens, position):
    tokens = tokens.clone()
    tokens[:, position] = (tokens[:, position] + 1) % VOCABULARY
    return tokens


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_source_token_and_no_later_target_token_counts(attention, placement):
    model, (target, source) = model_of(attention, norm_placement=placement), texts()
    logits = model(target, source=source).logits
    for position in range(6):
        other = model(target, source=changed(source, position)).logits
        assert (other != logits).any(-1).all(), "an encoder sees both sides"
    for position in range(1, LENGTH):
        other = model(changed(target, position), source=source).logits
        torch.testing.assert_close(other[:, :position], logits[:, :position], **CLOSE)
        assert (other[:, position] != logits[:, position]).any()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_changes_nothing_and_is_not_routed(attention, placement):
    """Logits, every router's statistics, and with them losses: each pair as if alone."""
    model, (target, source) = model_of(attention, norm_placement=placement), texts()
    batch = model(target, REAL, None, source, SOURCE_REAL)
    calls = {call.router for call in batch.statistics}
    assert ("attention.cross.query" in calls) == (attention == "moa")
    for b in range(2):
        alone = model(target[b : b + 1, REAL[b]], source=source[b : b + 1, SOURCE_REAL[b]])
        torch.testing.assert_close(batch.logits[b, REAL[b]], alone.logits[0], **CLOSE)
        assert batch.statistics.keys() == alone.statistics.keys()
        for call, statistics in alone.statistics.items():
            for ours, theirs in zip(
                batch.statistics[call].present(), statistics.present(), strict=True
            ):
                torch.testing.assert_close(ours[b], theirs[0], **CLOSE)


def test_padding_takes_no_capacity():
    model, (target, source) = model_of(**with_capacity("position")), texts()
    batch = model(target, REAL, None, source, SOURCE_REAL)
    dropped = {call.router for call, s in batch.statistics.items() if s.dropped.any()}
    assert dropped >= {"attention.query", "attention.cross.query", "ffn"}
    for b in range(2):
        alone = model(target[b : b + 1, REAL[b]], source=source[b : b + 1, SOURCE_REAL[b]])
        torch.testing.assert_close(batch.logits[b, REAL[b]], alone.logits[0], **CLOSE)


def test_texts_that_are_padding_alone_stay_finite():
    model, (target, source) = model_of(), texts()
    real, source_mask = REAL.clone(), SOURCE_REAL.clone()
    real[0] = source_mask[1] = False
    output = model(target, real, None, source, source_mask)
    output.logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [3, 1, 4]])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_logits_equal_those_of_one_forward(attention, placement, lengths):
    """The source is read once; later forwards have its keys and values from the cache."""
    model = model_of(
        attention, norm_placement=placement, num_layers=4, num_distinct_layers=2
    ).eval()
    target, source = texts()
    cache, logits, read = model.empty_cache(), [], (source, SOURCE_REAL)
    for piece in target.split(lengths, dim=1):
        output = model(piece, None, cache, *read)
        cache, read = output.cache, (None, None)
        logits.append(output.logits)
    whole = model(target, None, None, source, SOURCE_REAL).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, **CLOSE)
    assert all(k.shape[2] == 6 for layer in cache.layers for k in layer[2:])


def test_chosen_sequences_keep_their_source():
    model, (target, source) = model_of().eval(), texts()
    cache = model(target[:, :3], None, model.empty_cache(), source, SOURCE_REAL).cache
    rows = torch.tensor([1, 0, 1])
    logits = model(target[rows, 3:], None, cache.select(rows)).logits
    whole = model(target, None, None, source, SOURCE_REAL).logits[rows, 3:]
    torch.testing.assert_close(logits, whole, **CLOSE)


def test_decoder_routers_come_after_the_encoders():
    model, (target, source) = model_of(), texts()
    routers = model.routers()
    output = model(target, source=source)
    assert list(routers) == [call.key for call in output.statistics]
    assert RouterCall(1, 0, "attention.query") in output.statistics  # the encoder's last layer
    assert RouterCall(2, 0, "attention.cross.query") in output.statistics
    free = dropless(model)
    torch.testing.assert_close(free(target, source=source).logits, output.logits)


@pytest.mark.parametrize("attention", ATTENTION)
def test_counts_are_those_of_three_attentions(attention):
    """Two stacks, and one more attention per layer of the second."""
    fields = {"position": "sinusoidal", "tie_embeddings": True}
    alone = count(small_config(attention, **fields), LENGTH)
    both = count(small_config(attention, objective="translation", **fields), LENGTH)
    model = small_model(attention=attention, **fields)
    layer = model.stack.layers[0]
    norm = sum(p.numel() for p in layer.attention_norm.parameters())
    cross = sum(p.numel() for p in layer.attention.parameters()) + norm
    stack = sum(p.numel() for p in model.stack.parameters())
    assert both.total == alone.total + stack + 2 * cross + norm  # and the encoder's last norm
    attention_macs = 2 * sum(layer.attention.macs(LENGTH, training=True).values())
    assert both.training.block_macs == 2 * alone.training.block_macs + attention_macs
    assert both.experts - 2 * alone.experts == 2 * sum(
        p.numel() for name, p in layer.attention.named_parameters() if p.ndim == 3
    )


def test_label_smoothing_spreads_a_share_of_every_target():
    model, (target, source) = model_of(), texts()
    batch = Batch(target, REAL, None, source, SOURCE_REAL)
    log_probability = model(*batch.inputs()).logits.log_softmax(-1)
    predicted = REAL[:, 1:]
    chosen = log_probability[predicted].gather(1, target[:, 1:][predicted][:, None]).sum()
    spread = log_probability[predicted].mean(-1).sum()
    expected = -(0.9 * chosen + 0.1 * spread)
    ours = objective(model, batch, label_smoothing=0.1).cross_entropy
    torch.testing.assert_close(ours, expected)
    assert batch.num_targets() == predicted.sum()
    plain = F.nll_loss(log_probability[predicted], target[:, 1:][predicted], reduction="sum")
    torch.testing.assert_close(objective(model, batch).cross_entropy, plain)


def test_masked_model_sees_both_sides_and_has_no_cache():
    model, tokens = small_model(attention="moa", objective="masked"), tokens_of()
    logits = model(tokens).logits
    for position in range(LENGTH):
        assert (model(changed(tokens, position)).logits != logits).any(-1).all()
    with pytest.raises(ValueError, match="cannot use a cache"):
        model(tokens, None, model.empty_cache())


def test_a_source_is_for_translation_alone():
    target, source = texts()
    with pytest.raises(ValueError, match="needs a source"):
        model_of()(target)
    with pytest.raises(ValueError, match="only a model that translates"):
        small_model()(target, source=source)
    model = model_of().eval()
    cache = model(target[:, :3], None, model.empty_cache(), source).cache
    with pytest.raises(ValueError, match="the cache holds a source already"):
        model(target[:, 3:], None, cache, source)


def test_dropout_is_for_training_and_follows_the_seed():
    model, (target, source) = model_of(dropout=0.5), texts()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model.train()(target, source=source).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    without = model_of()
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        model.eval()(target, source=source).logits, without(target, source=source).logits, **CLOSE
    )
