"""A score is the log-softmax of one sequence at a time, whatever else is scored with it."""

from dataclasses import replace

import pytest
import torch

from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import train_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.scoring import Request, Scorer
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch

LENGTH = 12
TEXT = "the cat sat on the mat and the dog ran after it, over the hill; "
REQUESTS = [
    Request("", "the cat"),
    Request("the cat sat", " on the mat"),
    Request("the cat sat ", "on the mat"),  # the same, by where the space belongs
    Request("the dog", " ran"),
    Request((TEXT * 3).strip(), " the end"),  # cut from the left
    Request("", TEXT * 2),  # longer than the model sees
    Request("the hill", f" {TEXT}"),
    Request("café 日本", " 🚢"),
]


def router(**changes):
    return {"num_experts": 4, "top_k": 2, "score": "sigmoid"} | changes


def make_scorer(micro_batch=3, **router_changes):
    tokenizer = train_tokenizer([TEXT], 270)
    config = ModelConfig.model_validate(
        {
            "vocab_size": tokenizer.vocab_size,
            "d_model": 16,
            "num_layers": 2,
            "norm_placement": "peri",
            "attention": {
                "kind": "switchhead",
                "num_heads": 2,
                "d_head": 8,
                "router": router(**router_changes),
            },
            "ffn": {"kind": "moe", "d_expert": 8, "router": router(**router_changes)},
        }
    )
    model = build_model(config, seed=1).double().eval()
    return Scorer(model, config, tokenizer, LENGTH, micro_batch)


@torch.no_grad()
def by_hand(scorer, context, continuation):
    """(sum, tokens, greedy, cut), from one forward per token of the continuation."""
    tokenizer = scorer.tokenizer
    before = [tokenizer.end_of_document, *tokenizer.encode(context)]
    targets = tokenizer.encode(continuation)
    total, greedy = 0.0, True
    for start in range(0, len(targets), LENGTH):
        piece = targets[start : start + LENGTH]
        everything = before + targets[: start + len(piece)]
        row = everything[-LENGTH - 1 :]
        for at in range(len(row) - len(piece), len(row)):
            logits = scorer.model(torch.tensor([row[:at]])).logits[0, -1]
            total += logits.log_softmax(-1)[row[at]].item()
            greedy &= int(logits.argmax()) == row[at]
    return total, len(targets), greedy, len(before) - 1 + len(targets) > LENGTH


def assert_close(scores, expected):
    assert len(scores) == len(expected)
    for score, other in zip(scores, expected, strict=True):
        assert score[0] == pytest.approx(other[0], rel=1e-12)
        assert score[1:] == other[1:]


def test_scores_are_sums_of_log_softmax():
    scorer = make_scorer()
    expected = [by_hand(scorer, *request) for request in REQUESTS]
    expected[2] = by_hand(scorer, "the cat sat", " on the mat")
    scores = scorer.score(REQUESTS)
    assert_close(scores, expected)
    assert scores[1] == scores[2]
    assert scores[4].num_tokens < LENGTH < scores[5].num_tokens, "no request tests a cut"
    assert {score.cut for score in scores} == {False, True}
    assert scores[5].per_token == scores[5].log_likelihood / scores[5].num_tokens


def test_what_greedy_decoding_writes_is_greedy():
    scorer = make_scorer()
    for context in TEXT.split():
        ids = [scorer.tokenizer.end_of_document, *scorer.tokenizer.encode(context)]
        with torch.no_grad():
            token = int(scorer.model(torch.tensor([ids])).logits[0, -1].argmax())
        likely = scorer.tokenizer.decode([token])
        if scorer.tokenizer.encode(likely) == [token]:  # not a part of a character
            break
    score, longer = scorer.score([Request(context, likely), Request(context, f"{likely}qqqq")])
    assert score.greedy
    assert score.num_tokens == 1
    assert not longer.greedy


@pytest.mark.parametrize("micro_batch", [1, 2, 50])
def test_batches_and_order_change_nothing(micro_batch):
    expected = make_scorer().score(REQUESTS)
    assert_close(make_scorer(micro_batch).score(REQUESTS), expected)
    assert_close(make_scorer(micro_batch).score(REQUESTS[::-1]), expected[::-1])


@pytest.mark.parametrize("group_sequences", [1, 2])
def test_capacity_is_not_shared_with_other_requests_or_padding(group_sequences):
    changes = {
        "capacity": {"factor": 0.7, "policy": "position"},
        "group_sequences": group_sequences,
    }
    alone = [make_scorer(**changes).score([request])[0] for request in REQUESTS]
    assert_close(make_scorer(50, **changes).score(REQUESTS), alone)
    roomy = make_scorer(50).score(REQUESTS)
    assert alone[0].log_likelihood != pytest.approx(roomy[0].log_likelihood, rel=1e-6)


def test_no_requests_and_no_continuation():
    scorer = make_scorer()
    assert scorer.score([]) == []
    assert scorer.score([Request("the", "")]) == [(0.0, 0, True, False)]


def test_text_that_cannot_be_encoded():
    with pytest.raises(DataError):
        make_scorer().score([Request("", "\ud800")])


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, {"factor": 0.5, "policy": "position"}])
def test_documents_are_scored_as_in_a_packed_sample(capacity):
    """By a forward over the text alone, which does not see the end token before it."""
    scorer = replace(make_scorer(capacity=capacity), document_attention=True)
    if capacity:  # which is shared by all tokens of a sequence, whatever their document
        scorer = replace(scorer, max_length=100)
    end, encode = scorer.tokenizer.end_of_document, scorer.tokenizer.encode
    context, continuation = "the cat sat", " on the mat"
    before, targets = encode(context), encode(continuation)
    (score,) = scorer.score([Request(context, continuation)])
    text = torch.tensor([[*before, *targets]])
    sample = torch.cat([torch.tensor([[end]]), text], dim=1)
    packed = scorer.model(*Batch(sample).in_documents(end).inputs()).logits[0]
    expected = packed.log_softmax(-1)[len(before) :].gather(1, text[0, len(before) :, None]).sum()
    assert score.log_likelihood == pytest.approx(expected.item(), rel=1e-12)
    if capacity is None:
        alone = scorer.model(text).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = alone.gather(1, text[0, len(before) :, None]).sum()
        assert score.log_likelihood == pytest.approx(expected.item(), rel=1e-12)
        (other,) = replace(scorer, document_attention=False).score([Request(context, continuation)])
        assert other.log_likelihood != pytest.approx(expected.item(), rel=1e-4)
