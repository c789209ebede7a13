"""Byte-level BPE: training on a sample of the text, loading, encoding.

Training is deterministic: the sample depends on the seed and the text only, and the
library breaks ties between merges by token id.
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
"""The 256 bytes and the end-of-document token: any text can be encoded."""
LARGEST_VOCAB = 1 << 20
"""Beyond all use; the library takes memory and time for every id, used or not, without limit."""
DEFAULT_SAMPLE_BYTES = 50_000_000
_ANY_TEXT = ("a", "Z", "0", "~", "é", "ж", "日", "🚢")
_PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; made by `load_tokenizer` or `train_tokenizer`."""

    backend: tokenizers.Tokenizer
    """The library's tokenizer, in which special tokens in the text are ordinary text."""
    vocab_size: int
    """Ids run from 0 to this number, exclusive."""
    end_of_document: int
    """Id of the token that ends each document; text never encodes to it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without the end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; the library works on them in parallel."""
        try:
            batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises a bare Exception for whatever is wrong
            raise DataError(
                f"the tokenizer cannot encode the text ({error}); use one that encodes any text, "
                "such as a byte-level BPE of moa-dist prepare"
            ) from error
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, special tokens stay."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Contents of `tokenizer.json`."""
        return self.backend.to_str(pretty=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, given by its path or by the folder that holds it.

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
            "moa-dist prepare wrote"
        ) from error
    except Exception as error:  # the library raises a bare Exception for whatever is wrong
        raise DataError(
            f"{file}: not a tokenizer ({error}); copy it again from the folder that "
            "moa-dist prepare wrote"
        ) from error
    return _wrap(backend, str(file))


def train_tokenizer(sample: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose token 0 is the end of a document.

    A small sample may give fewer tokens than asked for; `vocab_size` of the result counts.

    Args:
        sample: texts, as `sample_text` gives them.
        vocab_size: tokens wanted, at least 257.

    Raises:
        DataError: `vocab_size` is too small or too large.
    """
    if vocab_size > LARGEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} is more than {LARGEST_VOCAB}; use a smaller --vocab-size"
        )
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the end-of-document "
            f"token; use --vocab-size {SMALLEST_VOCAB} or more"
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
    return _wrap(backend, "the new tokenizer")


def sample_text(documents: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Choose pieces of documents at random, about `limit_bytes` of UTF-8 in all.

    One pass, and never more than the limit in memory: every piece gets a random priority,
    and the pieces of lowest priority are kept. Pieces rather than documents, so that a few
    huge documents are sampled as evenly as many small ones.

    Args:
        documents: the whole text.
        limit_bytes: the most to keep; if the text is smaller, all of it is kept.
        seed: of the choice.

    Returns:
        The pieces in the order of the text.
    """
    priorities = random.Random(seed)  # random() is stable across Python versions
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    pieces = (piece for document in documents for piece in split_pieces(document))
    for index, piece in enumerate(pieces):
        # heapq pops the smallest; negated, so that the highest priority number goes first.
        heapq.heappush(kept, (-priorities.random(), index, piece))
        kept_bytes += len(piece.encode())
        while kept_bytes > limit_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def split_pieces(text: str, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, after a line's end if possible.

    Bounds the memory of the library (about 100 bytes per token) and lets it work on one huge
    document in parallel. The pieces concatenated are the text; only the tokens next to a cut
    may differ from those of the whole text.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _wrap(backend: tokenizers.Tokenizer, source: str) -> Tokenizer:
    end_of_document = backend.token_to_id(END_OF_DOCUMENT)
    if end_of_document is None:
        raise DataError(
            f"{source}: the tokenizer has no {END_OF_DOCUMENT} token, which ends each document; "
            "train one with moa-dist prepare --vocab-size"
        )
    # Otherwise a text that spells the special token would end its document.
    backend.encode_special_tokens = True
    # Set in some published files; they would change the number of tokens per document.
    backend.no_padding()
    backend.no_truncation()
    # Not the number of tokens: some published files leave ids out.
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= LARGEST_VOCAB:
        raise DataError(
            f"{source}: token id {largest} is beyond {LARGEST_VOCAB}; use another tokenizer"
        )
    tokenizer = Tokenizer(backend, largest + 1, end_of_document)
    try:
        encoded = tokenizer.encode_batch(_ANY_TEXT)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    for text, ids in zip(_ANY_TEXT, encoded, strict=True):
        if not ids:
            raise DataError(
                f"{source}: the tokenizer has no token for {text!a} and would leave it out of the "
                "text; use one that encodes any text, such as a byte-level BPE of moa-dist prepare"
            )
    return tokenizer
