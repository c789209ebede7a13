"""Tokenizers of other projects: their end of documents, and spaces that belong to words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from moa_dist.data.prepare import prepare
from moa_dist.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moa_dist.evaluate.generate import Drawn, stream_text
from tests.data.test_prepare import decoded_documents
from tests.raises import raises_data_error

TEXT = "The ship sails.\n\n  The sea,  the ship (日本 🚢).\n"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_like(folder: Path) -> Path:
    """A BPE as SentencePiece makes it: words begin with a space, and so does a text."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *map(chr, range(33, 127)), "▁", "▁t", "▁s"]
    merges = [("▁", "t"), ("▁", "s"), ("h", "e"), ("▁t", "he"), ("h", "i"), ("hi", "p")]
    pieces += ["he", "▁the", "hi", "hip"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    file = folder / "tokenizer.json"
    backend.save(str(file))
    return file


def renamed(folder: Path, end: str) -> Path:
    file = folder / "tokenizer.json"
    content = train_tokenizer([TEXT], 300).to_json()
    file.write_text(content.replace("<|endoftext|>", end))
    return file


def test_the_end_is_named_by_the_user_and_kept_in_the_file(tmp_path: Path) -> None:
    file = renamed(tmp_path, "<eos>")
    with raises_data_error("--end-of-document", "<eos>", path=file, key="<|endoftext|>"):
        load_tokenizer(file)
    with raises_data_error("no <end> token", path=file, key="<end>"):
        load_tokenizer(file, "<end>")
    tokenizer = load_tokenizer(file, "<eos>")
    assert (tokenizer.end_of_document, tokenizer.end_token) == (0, "<eos>")
    assert 0 not in tokenizer.encode("a<eos>b")
    kept = tmp_path / "kept.json"
    kept.write_text(tokenizer.to_json())
    assert load_tokenizer(kept).end_token == "<eos>"
    assert load_tokenizer(kept).to_json() == tokenizer.to_json()
    # Other libraries read the file, and add nothing to a text.
    other = tokenizers.Tokenizer.from_file(str(kept))
    assert other.encode("The ship").ids == tokenizer.encode("The ship")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("value", ["<eos>", {"content": "<eos>", "lstrip": False}])
def test_the_end_is_found_in_the_files_next_to_it(tmp_path: Path, name: str, value: object) -> None:
    file = renamed(tmp_path, "<eos>")
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    assert load_tokenizer(file).end_token == "<eos>"
    assert load_tokenizer(tmp_path).end_token == "<eos>"


def test_a_token_that_text_can_spell_ends_no_document(tmp_path: Path) -> None:
    file = renamed(tmp_path, "<eos>")
    with raises_data_error("would end its document", path=file):
        load_tokenizer(file, "e")


def test_a_tokenizer_that_is_not_byte_level_keeps_all_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama_like(tmp_path), "</s>")
    assert not tokenizer.is_byte_level
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    # The space that the tokenizer puts before a text is not put before a continuation.
    for context, text in [
        ("The", " ship"),
        ("The s", "hip"),
        ("", TEXT),
        ("a\n", "the"),
        ("t", "he"),
    ]:
        ((before, after),) = tokenizer.encode_after([(context, text)])
        assert before + after == tokenizer.encode(context + text)
        assert after != tokenizer.encode(text) or not context


def test_documents_in_pieces_get_no_spaces_in_between(tmp_path: Path) -> None:
    file, text = llama_like(tmp_path), "the ship sails\n" * 20_000  # several pieces
    (tmp_path / "text.txt").write_text(text)
    prepare(
        [str(tmp_path / "text.txt")],
        tmp_path / "out",
        block_length=16,
        tokenizer=file,
        end_of_document="</s>",
        samples_per_shard=1,
    )
    found = "".join(decoded_documents(tmp_path / "out"))
    assert text.startswith(found)
    assert len(found) > len(text) - 100
    assert load_tokenizer(tmp_path / "out").end_token == "</s>"


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_generated_text_has_its_spaces(tmp_path: Path, kind: str) -> None:
    tokenizer = (
        load_tokenizer(llama_like(tmp_path), "</s>")
        if kind == "llama"
        else train_tokenizer([TEXT], 300)
    )
    for prompt, text in [("The ship", " sails the  sea 🚢\n ok"), ("", "the sea")]:
        assert streamed(tokenizer, prompt, text) == text


def streamed(tokenizer: Tokenizer, prompt: str, text: str) -> str:
    ((before, after),) = tokenizer.encode_after([(prompt, text)])
    drawn = [Drawn(0, token) for token in after]
    return "".join(piece for _, piece in stream_text(tokenizer, drawn, [before]))


def test_tokenizers_that_lose_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    backend = train_tokenizer([TEXT], 300).backend
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(file))
    with raises_data_error("changes text", "the ship", path=file):
        load_tokenizer(file)
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(file))
    with raises_data_error("use one that encodes any text", path=file):
        load_tokenizer(file)
