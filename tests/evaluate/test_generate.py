"""Sampling: the same seed gives the same text, and only from the tokens that it may draw."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import train_tokenizer
from moa_dist.evaluate.generate import generate, stream_text
from moa_dist.models.language_model import build_model
from tests.evaluate.runs import ROUTER, one_thread

END = 0
OPTIONS = {
    "max_new_tokens": 12,
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": 3,
    "end_of_document": END,
    "max_length": 6,
}


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 16,
            "num_layers": 2,
            "norm_placement": "pre",
            "attention": {"kind": "switchhead", "num_heads": 2, "d_head": 8, "router": ROUTER},
            "ffn": {"kind": "moe", "d_expert": 8, "router": ROUTER},
        }
    )
    with one_thread():
        yield build_model(config).eval()


class Fixed(nn.Module):
    """Says the same probabilities for every next token, and remembers what it was shown."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())
        self.seen: list[list[int]] = []

    def forward(self, tokens):
        self.seen.append(tokens[0].tolist())
        return SimpleNamespace(logits=self.logits.expand(1, tokens.shape[1], -1))


def test_the_seed_alone_decides(model):
    options = OPTIONS | {"end_of_document": 50}  # beyond the vocabulary: never drawn
    first = list(generate(model, [7, 8], **options))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert list(generate(model, [7, 8], **options)) == first
    assert torch.equal(torch.get_rng_state(), before), "drew from the global generator"
    assert len(first) == 12
    assert list(generate(model, [7, 8], **options | {"seed": 4})) != first


def test_temperature_zero_takes_the_most_probable_token(model):
    context = [7, 8]
    for _ in range(12):
        logits = model(torch.tensor([context[-6:]])).logits
        context.append(int(logits[0, -1].argmax()))
    assert END not in context
    greedy = OPTIONS | {"temperature": 0.0}
    assert list(generate(model, [7, 8], **greedy)) == context[2:]
    # The limit from above is the same, and does not overflow.
    assert list(generate(model, [7, 8], **greedy | {"temperature": 5e-324})) == context[2:]


@pytest.mark.parametrize(
    ("top_p", "drawn"),
    [
        (0.0, {3}),
        (0.45, {3}),
        (0.55, {3, 1}),
        (0.79, {3, 1}),
        (0.81, {3, 1, 4}),
        (1.0, {1, 2, 3, 4}),
    ],
)
def test_top_p_draws_from_the_smallest_set(top_p, drawn):
    fixed = Fixed([0.0, 0.3, 0.05, 0.5, 0.15])
    options = OPTIONS | {"max_new_tokens": 300, "top_p": top_p}
    assert set(generate(fixed, [1], **options)) == drawn


def test_temperature_divides_the_logits():
    options = OPTIONS | {"max_new_tokens": 2000, "temperature": 0.5}
    drawn = list(generate(Fixed([0.0, 1 / 3, 2 / 3]), [1], **options))
    # Squared odds: 1 to 4. The bound is six standard deviations.
    assert abs(drawn.count(2) / 2000 - 0.8) < 0.054


def test_it_ends_with_the_document_and_sees_no_more_than_it_may():
    fixed = Fixed([0.1, 0.9])
    tokens = list(generate(fixed, [1] * 9, **OPTIONS | {"max_new_tokens": 1000}))
    assert 0 < len(tokens) < 1000
    assert END not in tokens
    assert {len(context) for context in fixed.seen} == {6}


def test_an_empty_prompt_begins_a_document():
    fixed = Fixed([0.0, 1.0])
    assert list(generate(fixed, [], **OPTIONS | {"max_new_tokens": 2})) == [1, 1]
    assert fixed.seen == [[END], [END, 1]]


def test_tokens_come_one_by_one():
    fixed = Fixed([0.0, 1.0])
    next(generate(fixed, [1], **OPTIONS))
    assert len(fixed.seen) == 1


def test_text_comes_in_whole_characters():
    tokenizer = train_tokenizer(["a"], 257)  # one token per byte
    text = "café 日本🚢!"
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, ids))
    assert [piece for piece in pieces if piece] == list(text)
    # Bytes that are no text: nothing is lost, and the replacement is the decoder's.
    broken = [ids[-2], ids[0], *ids[3:4], tokenizer.end_of_document, *ids[6:8]]
    assert "".join(stream_text(tokenizer, broken)) == tokenizer.decode(broken)
    assert list(stream_text(tokenizer, ids[:2])) == ["c", "a", ""]
