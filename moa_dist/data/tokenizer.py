"""Trains byte-level BPE tokenizers, and loads and applies these and others that keep all text.

Training is deterministic: the sample depends only on the seed and the text, and the library breaks
ties between merges by token id.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moa_dist.data.manifest import read_regular_file
from moa_dist.data.text import split_pieces
from moa_dist.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
SMALLEST_VOCAB = 257
"""The 256 bytes and the end-of-document token, with which any text can be encoded."""
LARGEST_VOCAB = 1 << 20
"""Sanity limit: the library spends memory and time on every id, used or not."""
DEFAULT_SAMPLE_BYTES = 50_000_000
_MARK = "end_of_document"
"""Name, in the file's post-processor, of the token that ends documents; needed if it is not
`END_OF_DOCUMENT`. Texts are not processed with it."""
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_WHOLE_TEXT = "The ship, No. 7:\n\n    sails at 10  (café, ж 日本)\t{x == 'y'}; 🚢\n"
_PARTS_OF_TEXT = ("a", " b", "  c", "\n", " \n d", "é\n")
_ANY_TEXT = ("a", "Z", "0", "~", "é", "ж", "日", "🚢")


@dataclass(frozen=True)
class Tokenizer:
    """Converts text to token ids and back; made by `load_tokenizer` or `train_tokenizer`."""

    backend: tokenizers.Tokenizer
    """The library's tokenizer, set to treat special tokens in the text as ordinary text."""
    vocab_size: int
    """Size of the vocabulary; ids are below it."""
    end_of_document: int
    """Id of the token that ends each document; text never encodes to it."""
    is_byte_level: bool
    """Whether parts of a text can be encoded and decoded by themselves. Others add a space to a
    text's beginning, or remove it, so that parts need the text before them."""

    @property
    def end_token(self) -> str:
        """Return the token that ends each document."""
        return str(self.backend.id_to_token(self.end_of_document))

    def encode(self, text: str) -> list[int]:
        """Encode one text, without the end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts in parallel."""
        try:
            batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"the tokenizer cannot encode the text ({error}); use one that encodes any text, "
                "such as a byte-level BPE of moa-dist prepare"
            ) from error
        return [encoding.ids for encoding in batch]

    def encode_after(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Encode pairs of a context and the text that follows it.

        A token that holds characters of both counts as text.
        """
        if self.is_byte_level:
            distinct = list(dict.fromkeys(text for pair in texts for text in pair))
            ids = dict(zip(distinct, self.encode_batch(distinct), strict=True))
            return [(ids[context], ids[text]) for context, text in texts]
        contexts = self.encode_batch([context for context, _ in texts])
        both = self.encode_batch([context + text for context, text in texts])
        result = []
        for before, whole in zip(contexts, both, strict=True):
            pairs = enumerate(zip(before, whole, strict=False))
            shared = min(len(before), len(whole))
            common = next((at for at, (one, other) in pairs if one != other), shared)
            result.append((whole[:common], whole[common:]))
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD, special tokens are kept."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Serialize as the content of `tokenizer.json`."""
        return self.backend.to_str(pretty=True)


def load_tokenizer(path: Path, end_of_document: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json`, given its path or the folder that holds it.

    Args:
        path: the file or the folder.
        end_of_document: token that ends documents; None to take the one that the file names,
            <|endoftext|>, or the `eos_token` of the files next to it.

    Raises:
        DataError: the file is missing, cannot be parsed, does not keep all text, or has no
            end-of-document token.
    """
    file = path
    try:
        file = path / TOKENIZER_FILE if path.is_dir() else path
        content = read_regular_file(file).decode()
        backend = tokenizers.Tokenizer.from_str(content)
        marked = _marked_end(json.loads(content))
    except OSError as error:
        raise DataError(
            f"{file}: no tokenizer here ({error.strerror}); give the tokenizer.json that "
            "moa-dist prepare wrote",
            path=file,
        ) from error
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{file}: not a tokenizer ({error}); copy it again from the folder that "
            "moa-dist prepare wrote",
            path=file,
        ) from error
    end = end_of_document or marked
    if end is None and backend.token_to_id(END_OF_DOCUMENT) is None:
        end = _end_in_settings(file.parent)
    end = end or END_OF_DOCUMENT
    tokenizer = _wrap(backend, file, end)
    if end != END_OF_DOCUMENT or marked:
        mark = {"id": _MARK, "ids": [tokenizer.end_of_document], "tokens": [end]}
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B:1", special_tokens=[mark]
        )
    return tokenizer


def _marked_end(content: Any) -> str | None:
    """Return the token that the content of a `tokenizer.json` names as the end of documents."""
    processor = content.get("post_processor") or {}
    mark = processor.get("special_tokens", {}).get(_MARK) if isinstance(processor, dict) else None
    if not mark:
        return None
    (end,) = mark["tokens"]
    return str(end)


def _end_in_settings(folder: Path) -> str | None:
    """Return the `eos_token` of the settings of transformers next to a `tokenizer.json`."""
    for name in _SETTINGS_FILES:
        try:
            end = json.loads(read_regular_file(folder / name)).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(end, dict):
            end = end.get("content")
        if isinstance(end, str):
            return end
    return None


def train_tokenizer(sample: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose token 0 is the end of a document.

    A small sample may give fewer tokens than requested; see `vocab_size` of the result.

    Args:
        sample: texts, as returned by `sample_text`.
        vocab_size: requested number of tokens, at least 257.

    Raises:
        DataError: `vocab_size` is too small or too large.
    """
    if vocab_size > LARGEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} exceeds {LARGEST_VOCAB}; use a smaller --vocab-size",
            key="--vocab-size",
        )
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the end-of-document "
            f"token; use --vocab-size {SMALLEST_VOCAB} or more",
            key="--vocab-size",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer)
    return _wrap(backend, None, END_OF_DOCUMENT)


def sample_text(documents: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Sample pieces of documents at random, about `limit_bytes` of UTF-8 in total.

    Takes one pass and keeps at most the limit in memory: every piece gets a random priority, and
    the pieces with the lowest numbers are kept. Pieces are sampled rather than documents, so that
    a few huge documents are covered as evenly as many small ones.

    Args:
        documents: the whole text.
        limit_bytes: maximum to keep; a smaller text is kept whole.
        seed: seed of the priorities.

    Returns:
        The sampled pieces in the order of the text.
    """
    priorities = random.Random(seed)  # random() is stable across Python versions
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    pieces = (piece for document in documents for piece in split_pieces([document]))
    for index, piece in enumerate(pieces):
        # heapq pops the smallest; negated, so that the highest number is dropped first.
        heapq.heappush(kept, (-priorities.random(), index, piece))
        kept_bytes += len(piece.encode())
        while kept_bytes > limit_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def _wrap(backend: tokenizers.Tokenizer, file: Path | None, end: str) -> Tokenizer:
    """Check and configure the library's tokenizer, read from `file` or newly trained."""
    source = file or "the new tokenizer"
    end_of_document = backend.token_to_id(end)
    if end_of_document is None:
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        raise DataError(
            f"{source}: the tokenizer has no {end} token to end each document; name the token that "
            f"does with --end-of-document (special tokens: {', '.join(special[:20]) or 'none'}), "
            "or train one with moa-dist prepare --vocab-size",
            path=file,
            key=end,
        )
    # Otherwise, a text that spells the special token would end its document.
    backend.encode_special_tokens = True
    # Some published files set these; they would change the number of tokens per document.
    backend.no_padding()
    backend.no_truncation()
    # Not the number of tokens: some published files skip ids.
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= LARGEST_VOCAB:
        raise DataError(
            f"{source}: token id {largest} is beyond {LARGEST_VOCAB}; use another tokenizer",
            path=file,
        )
    tokenizer = Tokenizer(backend, largest + 1, end_of_document, is_byte_level=False)
    try:
        problem = _problem(tokenizer, end)
        whole = "".join(_PARTS_OF_TEXT)
        parts = [*_PARTS_OF_TEXT, whole]
        encoded = tokenizer.encode_batch(parts)
        joined = tokenizer.decode([token for ids in encoded[:-1] for token in ids])
        is_byte_level = joined == whole and [tokenizer.decode(ids) for ids in encoded] == parts
    except DataError as error:
        raise DataError(f"{source}: {error}", path=file) from error
    if problem:
        raise DataError(
            f"{source}: {problem}; use one that encodes any text, such as a byte-level BPE of "
            "moa-dist prepare",
            path=file,
        )
    return replace(tokenizer, is_byte_level=is_byte_level)


def _problem(tokenizer: Tokenizer, end: str) -> str | None:
    """Return how the tokenizer would lose or misread text, if it would."""
    for text, ids in zip(_ANY_TEXT, tokenizer.encode_batch(_ANY_TEXT), strict=True):
        if not ids:
            return f"the tokenizer has no token for {text!a} and would drop it from the text"
    ids = tokenizer.encode(_WHOLE_TEXT)
    if (found := tokenizer.decode(ids).removeprefix(" ")) != _WHOLE_TEXT:
        return f"the tokenizer changes text: {_WHOLE_TEXT!r} comes back as {found!r}"
    if any(tokenizer.end_of_document in ids for ids in tokenizer.encode_batch([end, f"a {end}"])):
        return f"text that spells {end} would end its document"
    return None
