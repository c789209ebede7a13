"""Sampling: the same seed gives the same text, and only from the tokens that it may draw."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import train_tokenizer
from moa_dist.evaluate.generate import Drawn, generate, stream_text
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.cache import Cache
from moa_dist.models.language_model import build_model
from tests.evaluate.runs import ROUTER, one_thread
from tests.models.small import small_config

END, NEVER = 0, 50  # the second is beyond the vocabulary
GREEDY = Sampling(temperature=0.0)
OPTIONS = {"max_new_tokens": 12, "seed": 3, "end_of_document": NEVER, "max_length": 6}
PROMPTS = [[7, 8], [9], [], [4, 3, 2, 1, 5, 6, 7, 8], [7, 8]]


def make_model(**router):
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": 16,
            "num_layers": 4,
            "num_distinct_layers": 2,
            "norm_placement": "pre",
            "attention": {"kind": "switchhead", "num_heads": 2, "d_head": 8, "router": ROUTER},
            "ffn": {"kind": "moe", "d_expert": 8, "router": ROUTER | router},
        }
    )
    return build_model(config).double().eval()


@pytest.fixture(scope="module")
def model():
    with one_thread():
        yield make_model()


class Fixed(nn.Module):
    """Predicts the same probabilities for every next token, and records its inputs."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config = small_config(ffn="dense")
        self.logits = nn.Parameter(torch.tensor(probabilities).log())
        self.seen: list[list[list[int]]] = []

    def empty_cache(self):
        return Cache(())

    def forward(self, tokens, token_mask, cache, documents=None, tasks=None):
        self.seen.append(tokens.tolist())
        return SimpleNamespace(logits=self.logits.expand(*tokens.shape, -1), cache=cache)


def continued(model, prompts, sampling=GREEDY, **options):
    """New tokens of each prompt."""
    texts = [[] for _ in prompts]
    for prompt, token in generate(model, prompts, sampling, **OPTIONS | options):
        texts[prompt].append(token)
    return texts


def test_the_seed_alone_decides(model):
    first = continued(model, [[7, 8]], Sampling())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert continued(model, [[7, 8]], Sampling()) == first
    assert torch.equal(torch.get_rng_state(), before), "drew from the global generator"
    assert len(first[0]) == 12
    assert continued(model, [[7, 8]], Sampling(), seed=4) != first


@pytest.mark.parametrize("max_length", [1, 5, 6, 100])
def test_greedy_takes_the_most_probable_token_after_all_that_it_sees(model, max_length):
    """Compare with forwards without a cache; a text over the limit continues from its last half."""
    expected = []
    for prompt in PROMPTS:
        text, new = prompt[-max_length:] or [END], []
        for _ in range(12):
            new.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            text = [*text, new[-1]]
            if len(text) > max_length:
                text = text[-((max_length + 1) // 2) :]
        expected.append(new)
    assert expected[1] != expected[2]
    options = {"max_length": max_length, "end_of_document": END}
    expected = [text[: [*text, END].index(END)] for text in expected]
    assert continued(model, PROMPTS, **options) == expected
    # The limit from above is the same, and does not overflow.
    assert continued(model, PROMPTS, Sampling(temperature=5e-324), **options) == expected
    assert continued(model, PROMPTS, Sampling(top_k=1), **options) == expected


@pytest.mark.parametrize("max_length", [6, 100])
def test_a_text_does_not_see_what_precedes_its_end_token(model, max_length):
    """After an end token, a prompt goes on as it would alone, with a cache and when cut."""
    options = {"end_of_document": END, "max_length": max_length, "document_attention": True}
    alone = continued(model, PROMPTS[:2], **options)
    assert continued(model, PROMPTS[:2], **options | {"document_attention": False}) == alone
    after = [[END, *PROMPTS[0]], [3, 4, END, *PROMPTS[1]]]
    assert [text[:3] for text in continued(model, after, **options)] == [t[:3] for t in alone]
    if max_length > 20:
        assert continued(model, after, **options) == alone
        assert continued(model, after, **options | {"document_attention": False}) != alone


def test_prompts_do_not_see_each_other(model):
    """Nor the end of another's text, nor that another has outgrown the limit."""
    together = continued(model, PROMPTS, Sampling(), end_of_document=13, max_new_tokens=40)
    assert len({len(text) for text in together}) > 2, "all end together: the test proves nothing"
    for i, prompt in enumerate(PROMPTS):
        options = {"seed": OPTIONS["seed"] + i, "end_of_document": 13, "max_new_tokens": 40}
        # Of an empty prompt the first token is the document's end.
        assert continued(model, [prompt or [13]], Sampling(), **options) == [together[i]]
    assert together[0] != together[4], "equal prompts with equal draws"


def test_capacity_is_left_out():
    capacity = {"capacity": {"factor": 0.5}, "group_sequences": 2}
    free, limited = make_model(), make_model(**capacity)
    prompts = [[7, 8], [9], [4, 3, 2]]
    assert continued(limited, prompts) == continued(free, prompts)


PROBABILITIES = [0.0, 0.3, 0.05, 0.5, 0.15]


@pytest.mark.parametrize(
    ("top_k", "top_p", "drawn"),
    [
        (None, 0.0, {3}),
        (None, 0.45, {3}),
        (None, 0.55, {3, 1}),
        (None, 0.79, {3, 1}),
        (None, 0.81, {3, 1, 4}),
        (None, 1.0, {1, 2, 3, 4}),
        (1, 1.0, {3}),
        (3, 1.0, {3, 1, 4}),
        (99, 1.0, {1, 2, 3, 4}),
        (2, 0.61, {3}),  # 0.5 of 0.8
        (2, 0.64, {3, 1}),
    ],
)
def test_top_k_and_top_p_draw_from_the_smallest_set(top_k, top_p, drawn):
    (tokens,) = continued(
        Fixed(PROBABILITIES), [[1]], Sampling(top_k=top_k, top_p=top_p), max_new_tokens=300
    )
    assert set(tokens) == drawn


def test_temperature_divides_the_logits():
    fixed, sampling = Fixed([0.0, 1 / 3, 2 / 3]), Sampling(temperature=0.5)
    (drawn,) = continued(fixed, [[1]], sampling, max_new_tokens=2000)
    # Squared odds: 1 to 4. The bound is six standard deviations.
    assert abs(drawn.count(2) / 2000 - 0.8) < 0.054


def test_it_ends_with_the_document_and_sees_no_more_than_it_may():
    fixed = Fixed([0.1, 0.9])
    (tokens,) = continued(fixed, [[1] * 9], Sampling(), max_new_tokens=1000, end_of_document=END)
    assert 0 < len(tokens) < 1000
    assert END not in tokens
    # The whole limit once, then its half; one token at a time in between.
    assert [len(text) for (text,) in fixed.seen[:6]] == [6, 3, 1, 1, 1, 3]


def test_texts_that_have_ended_are_not_read():
    fixed = Fixed([0.1, 0.9])
    tokens = continued(fixed, [[1]] * 3, Sampling(), max_new_tokens=1000, end_of_document=END)
    lengths = sorted(map(len, tokens))
    assert len(set(lengths)) == 3
    for step, rows in enumerate(fixed.seen):
        assert len(rows) == sum(length >= step for length in lengths)


def test_an_empty_prompt_begins_a_document():
    fixed = Fixed([0.0, 1.0])
    assert continued(fixed, [[]], max_new_tokens=2, end_of_document=END) == [[1, 1]]
    assert fixed.seen == [[[END]], [[1]]]


def test_tokens_come_one_by_one():
    fixed = Fixed([0.0, 1.0])
    assert next(generate(fixed, [[1], [1, 1]], GREEDY, **OPTIONS)) == (0, 1)
    assert len(fixed.seen) == 1


def test_text_comes_in_whole_characters():
    tokenizer = train_tokenizer(["a"], 257)  # one token per byte
    text = "café 日本🚢!"
    ids = tokenizer.encode(text)
    assert list(stream_text(tokenizer, (Drawn(0, i) for i in ids))) == [(0, c) for c in text]
    # Bytes that are no text: nothing is lost, and the replacement is the decoder's.
    broken = [ids[-2], ids[0], *ids[3:4], tokenizer.end_of_document, *ids[6:8]]
    pieces = stream_text(tokenizer, (Drawn(0, i) for i in broken))
    assert "".join(piece for _, piece in pieces) == tokenizer.decode(broken)


def test_texts_of_several_prompts_are_kept_apart():
    tokenizer = train_tokenizer(["a"], 257)
    first, second = (tokenizer.encode(text) for text in ("日本", "🚢é"))
    turns = [Drawn(n, i) for pair in zip(first, second, strict=True) for n, i in enumerate(pair)]
    assert list(stream_text(tokenizer, turns)) == [(0, "日"), (1, "🚢"), (0, "本"), (1, "é")]
