"""Beam search finds what a search without cache, batch or padding finds."""

import pytest
import torch

from moa_dist.config.model import ModelConfig
from moa_dist.config.run import Config
from moa_dist.data.manifest import sha256_of
from moa_dist.data.tokenizer import train_tokenizer
from moa_dist.evaluate.bleu import bleu
from moa_dist.evaluate.trained import Trained
from moa_dist.evaluate.translate import Hypothesis, Search, beam_search, translate
from moa_dist.models.language_model import build_model
from tests.models.small import ATTENTION, FFN, router
from tests.raises import raises_data_error

END, VOCABULARY = 0, 11
SOURCES = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6], [9, 9]]
TEXTS = ["the sea", "", "wind over the sea", "the café", "sails far over the wide sea", "wind"]


def model_of(attention="moa", seed=0, **more):
    """Made to differ between hypotheses, and to come to an end."""
    config = ModelConfig.model_validate(
        {
            "objective": "translation",
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "num_layers": 2,
            "norm_placement": "post",
            "position": "sinusoidal",
            "attention": ATTENTION[attention] if isinstance(attention, str) else attention,
            "ffn": FFN["moe"],
        }
        | more
    )
    model = build_model(config, seed=seed).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.head.bias[END] += 2
    return model


@torch.no_grad()
def by_hand(model, source, search) -> Hypothesis:
    """One text, each hypothesis read anew, every continuation looked at."""
    going_on, finished = [Hypothesis((), 0.0)], []
    for _ in range(len(source) + 50):
        continued = []
        seen = torch.tensor([[END, *tokens] for tokens, _ in going_on])
        sources = torch.tensor([[*source, END]] * len(going_on))
        logits = model(seen, source=sources).logits[:, -1]
        for (tokens, total), row in zip(going_on, logits.log_softmax(-1).tolist(), strict=True):
            for token, more in enumerate(row):
                continued.append((total + more, (*tokens, token)))
        continued.sort(reverse=True)
        going_on = []
        for place, (total, tokens) in enumerate(continued):
            if tokens[-1] == END and place < search.beam:
                finished.append(Hypothesis(tokens[:-1], total))
            elif tokens[-1] != END and len(going_on) < search.beam:
                going_on.append(Hypothesis(tokens, total))
        if len(finished) >= search.beam:
            break
    best = finished or going_on[:1]
    return max(best, key=lambda h: h.log_probability / (len(h.tokens) + 1) ** search.length_penalty)


@pytest.mark.parametrize(
    ("attention", "search"),
    [
        ("moa", Search(1, 0.0)),
        ("moa", Search(3, 0.6)),
        ("switchhead", Search(4, 2.0)),
        ("dense", Search(2, 0.6)),
    ],
)
def test_as_by_hand(attention, search):
    model = model_of(attention)
    found = beam_search(model, SOURCES, search, end=END)
    for source, hypothesis in zip(SOURCES, found, strict=True):
        expected = by_hand(model, source, search)
        assert hypothesis.tokens == expected.tokens
        assert hypothesis.log_probability == pytest.approx(expected.log_probability)
    assert len({h.tokens for h in found}) > 1, "the source counts"
    if search == Search(3, 0.6):
        assert any(0 < len(h.tokens) < 50 for h in found), "not all ended by length"


def test_penalties_make_translations_longer():
    model = model_of()
    short, long = (
        sum(len(h.tokens) for h in beam_search(model, SOURCES, Search(4, a), end=END))
        for a in (0.0, 3.0)
    )
    assert long > short


def test_capacity_does_not_matter():
    capacity = {"factor": 0.5}
    section = {"kind": "moa", "d_head": 4, "router": router(3, 2, "softmax", capacity=capacity)}
    free = {"kind": "moa", "d_head": 4, "router": router(3, 2, "softmax")}
    found, expected = (
        beam_search(model_of(attention), SOURCES, Search(), end=END)
        for attention in (section, free)
    )
    assert found == expected


def trained(tmp_path, objective="translation") -> Trained:
    tokenizer = train_tokenizer([" ".join(TEXTS)], 280)
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": model_of(vocab_size=tokenizer.vocab_size).config.model_dump()
            | {"objective": objective},
            "data": {"train": "none", "sequence_length": 32},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        }
    )
    return Trained(
        folder=tmp_path,
        model=model_of(vocab_size=tokenizer.vocab_size, seed=1),
        device=torch.device("cpu"),
        step=1,
        config=config,
        tokenizer=tokenizer,
        tokenizer_file=tmp_path,
        tokenizer_sha256=sha256_of(b""),
    )


def translate_on_this_rank(tmp_path):
    return translate(trained(tmp_path), TEXTS, Search(2), batch=2)


def test_texts_in_their_order_whatever_the_batch(tmp_path):
    calls = []
    found = translate(
        trained(tmp_path), TEXTS, Search(2), batch=2, progress=lambda *call: calls.append(call)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert found[1] == ""
    assert found == translate(trained(tmp_path), TEXTS, Search(2), batch=5)
    alone = [translate(trained(tmp_path), [text], Search(2), batch=1)[0] for text in TEXTS]
    assert found == alone
    assert len(set(found)) > 2


def test_other_models_do_not_translate(tmp_path):
    with raises_data_error("causal", path=tmp_path, key="model.objective"):
        translate(trained(tmp_path, "causal"), TEXTS, Search(), batch=2)


def test_bleu_says_how_it_was_measured(tmp_path, monkeypatch):
    found = ["the wind and the sea are far", "a ship sails over the wide sea"]
    monkeypatch.setattr("moa_dist.evaluate.bleu.translate", lambda *_, **__: found)
    model, sources = trained(tmp_path), TEXTS[:2]
    perfect = bleu(model, sources, found, Search(), batch=2)
    assert perfect.score == pytest.approx(100.0)
    assert "tok:13a" in perfect.signature
    worse = bleu(model, sources, [found[0], "a ship sails over the sea"], Search(), batch=2)
    assert 10 < worse.score < 90
    with raises_data_error(2, 1, key="references"):
        bleu(model, sources, found[1:], Search(), batch=2)
    with raises_data_error(key="sources"):
        bleu(model, [], [], Search(), batch=2)
