"""The tokenizer is reproducible, loses nothing, and text cannot forge the end of a document."""

from __future__ import annotations

from pathlib import Path

from moa_dist.data.text import split_pieces
from moa_dist.data.tokenizer import (
    END_OF_DOCUMENT,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)
from tests.raises import raises_data_error


def test_training_is_deterministic_and_token_0_ends_documents(documents: list[str]) -> None:
    first, second = (train_tokenizer(documents, 400) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert (first.vocab_size, first.end_of_document) == (400, 0)
    assert first.decode([0]) == END_OF_DOCUMENT


def test_any_text_survives_even_if_never_seen(documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(documents, 300).to_json())
    tokenizer = load_tokenizer(tmp_path)
    for text in [*documents, " leading", "ключ \x00\t\n\n  \r\n", "🧭é\u0301"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_the_special_token_does_not_end_the_document(
    documents: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(documents, 300).to_json())
    ids = load_tokenizer(tmp_path).encode(f"a{END_OF_DOCUMENT}b")
    assert 0 not in ids


def test_small_vocabulary_is_refused() -> None:
    with raises_data_error(257, key="--vocab-size"):
        train_tokenizer(["text"], 256)


def test_damaged_missing_and_foreign_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with raises_data_error(path=file, key=None):
        load_tokenizer(file)
    file.write_text("{}")
    with raises_data_error(path=file, key=None):
        load_tokenizer(file)
    file.write_text(train_tokenizer(["text"], 257).to_json().replace(END_OF_DOCUMENT, "<other>"))
    with raises_data_error(path=file, key=END_OF_DOCUMENT):
        load_tokenizer(file)


def test_sample_is_bounded_seeded_and_spread_over_the_text() -> None:
    documents = [f"{n:04d} é" for n in range(1000)]  # 7 bytes each
    sample = sample_text(documents, 700, seed=1)
    assert sample == sample_text(iter(documents), 700, seed=1)
    assert sample != sample_text(documents, 700, seed=2)
    assert len(sample) == 100
    assert sample == sorted(sample)
    assert 300 < sum(int(piece[:4]) for piece in sample) / 100 < 700
    assert sample_text(documents, 7000, seed=1) == documents


def test_pieces_are_the_text_and_end_at_lines() -> None:
    text = "abc\ndefgh\n" * 5 + "x" * 23
    pieces = list(split_pieces(text, limit=12))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 12
    assert all(piece.endswith("\n") for piece in pieces[:5])
    assert list(split_pieces("")) == [""]
