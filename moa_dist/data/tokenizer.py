"""Trains, loads and applies byte-level BPE tokenizers.

Training is deterministic: the sample depends only on the seed and the text, and the library breaks
ties between merges by token id.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moa_dist.data.manifest import read_regular_file
from moa_dist.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
SMALLEST_VOCAB = 257
"""The 256 bytes and the end-of-document token, with which any text can be encoded."""
LARGEST_VOCAB = 1 << 20
"""Sanity limit: the library spends memory and time on every id, used or not."""
DEFAULT_SAMPLE_BYTES = 50_000_000
_ANY_TEXT = ("a", "Z", "0", "~", "é", "ж", "日", "🚢")
_PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Tokenizer:
    """Converts text to token ids and back; made by `load_tokenizer` or `train_tokenizer`."""

    backend: tokenizers.Tokenizer
    """The library's tokenizer, set to treat special tokens in the text as ordinary text."""
    vocab_size: int
    """Size of the vocabulary; ids are below it."""
    end_of_document: int
    """Id of the token that ends each document; text never encodes to it."""

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

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD, special tokens are kept."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Serialize as the content of `tokenizer.json`."""
        return self.backend.to_str(pretty=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, given its path or the folder that holds it.

    Raises:
        DataError: the file is missing, cannot be parsed, or has no end-of-document token.
    """
    file = path
    try:
        file = path / TOKENIZER_FILE if path.is_dir() else path
        backend = tokenizers.Tokenizer.from_str(read_regular_file(file).decode())
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
    return _wrap(backend, file)


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
    return _wrap(backend, None)


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
    pieces = (piece for document in documents for piece in split_pieces(document))
    for index, piece in enumerate(pieces):
        # heapq pops the smallest; negated, so that the highest number is dropped first.
        heapq.heappush(kept, (-priorities.random(), index, piece))
        kept_bytes += len(piece.encode())
        while kept_bytes > limit_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def split_pieces(text: str, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Split a text into pieces of at most `limit` characters, at line ends if possible.

    This bounds the library's memory (about 100 bytes per token) and lets it encode one huge
    document in parallel. The concatenated pieces are the text; only the tokens next to a split
    may differ from those of the whole text.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _wrap(backend: tokenizers.Tokenizer, file: Path | None) -> Tokenizer:
    """Check and configure the library's tokenizer, read from `file` or newly trained."""
    source = file or "the new tokenizer"
    end_of_document = backend.token_to_id(END_OF_DOCUMENT)
    if end_of_document is None:
        raise DataError(
            f"{source}: the tokenizer has no {END_OF_DOCUMENT} token, which ends each document; "
            "train one with moa-dist prepare --vocab-size",
            path=file,
            key=END_OF_DOCUMENT,
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
    tokenizer = Tokenizer(backend, largest + 1, end_of_document)
    try:
        encoded = tokenizer.encode_batch(_ANY_TEXT)
    except DataError as error:
        raise DataError(f"{source}: {error}", path=file) from error
    for text, ids in zip(_ANY_TEXT, encoded, strict=True):
        if not ids:
            raise DataError(
                f"{source}: the tokenizer has no token for {text!a} and would drop it from the "
                "text; use one that encodes any text, such as a byte-level BPE of moa-dist prepare",
                path=file,
            )
    return tokenizer
