"""Turns parallel text into shards: `lines of two files -> tokens -> tar shards + manifest`.

Line i of the source file is translated by line i of the target file. Both languages share one
tokenizer, which is trained on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from moa_dist.data.assembly import Progress
from moa_dist.data.decoding import read_lines
from moa_dist.data.manifest import (
    PairManifest,
    ShardEntry,
    save_manifest,
    sha256_of,
    smallest_dtype,
    token_dtype,
)
from moa_dist.data.output_folder import check_output, partial_folder, put_in_place
from moa_dist.data.pairs import write_pairs
from moa_dist.data.shards import Tokens
from moa_dist.data.tokenizer import (
    DEFAULT_SAMPLE_BYTES,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)
from moa_dist.errors import DataError

_LINES_AT_ONCE = 10_000

Item = TypeVar("Item")


class PairFiles(NamedTuple):
    """Names two files whose lines are translations of each other."""

    source: Path
    """File of the lines to translate."""
    target: Path
    """File of their translations."""


def prepare_pairs(
    files: Sequence[PairFiles],
    output: Path,
    *,
    block_length: int,
    vocab_size: int = 8000,
    tokenizer: Path | None = None,
    end_of_document: str | None = None,
    pairs_per_shard: int,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> PairManifest:
    """Turn parallel text into a folder of shards with a manifest and a tokenizer.

    The same files and options give byte-identical shards. Pairs with a text that is empty, or
    longer than `block_length` tokens including the end token, are skipped and counted.

    Args:
        files: pairs of parallel files, read one after the other.
        output: folder to create.
        block_length: maximum tokens of a text, end token included (L).
        vocab_size: size of the tokenizer that is trained when `tokenizer` is None.
        tokenizer: `tokenizer.json` to use instead, or a folder that holds one.
        end_of_document: token of `tokenizer` that ends texts; None to find it.
        pairs_per_shard: pairs in every shard but the last.
        seed: seed of the tokenizer's sample.
        force: replace an output that an earlier run wrote.
        progress: called while working.

    Raises:
        DataError: a file cannot be read, two files differ in their number of lines, every pair
            was skipped, an option is out of range, or the output exists.
    """
    if block_length < 2 or pairs_per_shard < 1:
        raise DataError(
            f"--sequence-length {block_length} must be at least 2, and --samples-per-shard "
            f"{pairs_per_shard} at least 1",
            key="--sequence-length" if block_length < 2 else "--samples-per-shard",
        )
    check_output(output, force)
    with partial_folder(output) as partial:
        if tokenizer is None:
            used = _train_tokenizer(files, vocab_size, seed, progress)
        else:
            used = load_tokenizer(tokenizer, end_of_document)
        encoder = _Encoder(used, block_length)
        groups = _in_groups(encoder.pairs(files, progress), pairs_per_shard)
        shards = [
            write_pairs(partial, index, index * pairs_per_shard, pairs)
            for index, pairs in enumerate(groups)
        ]
        if not shards:
            raise DataError(
                f"all {encoder.skipped:,} pairs were skipped: each has an empty text, or one of "
                f"more than {block_length} tokens; check the files and --sequence-length",
                key="--sequence-length",
            )
        tokenizer_json = used.to_json().encode()
        (partial / TOKENIZER_FILE).write_bytes(tokenizer_json)
        manifest = encoder.manifest(sha256_of(tokenizer_json), tuple(shards), pairs_per_shard)
        save_manifest(manifest, partial)
        put_in_place(partial, output)
    return manifest


def _train_tokenizer(
    files: Sequence[PairFiles], vocab_size: int, seed: int, progress: Progress
) -> Tokenizer:
    progress("training the tokenizer", 0, 1)
    lines = chain.from_iterable(_lines(files))
    trained = train_tokenizer(sample_text(lines, DEFAULT_SAMPLE_BYTES, seed), vocab_size)
    progress("training the tokenizer", 1, 1)
    return trained


def _lines(files: Sequence[PairFiles]) -> Iterator[tuple[str, str]]:
    for source, target in files:
        both = zip_longest(read_lines(source), read_lines(target))
        for number, (one, other) in zip(count(1), both, strict=False):
            if one is None or other is None:
                short, long = (source, target) if one is None else (target, source)
                raise DataError(
                    f"{short} has {number - 1} lines, and {long} has more: line i of one must be "
                    "the translation of line i of the other",
                    path=short,
                    line=number,
                )
            yield one, other


def _in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield groups of `size` items; the last may have fewer."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


class _Encoder:
    """Encodes pairs, and counts what the manifest records."""

    def __init__(self, tokenizer: Tokenizer, block_length: int) -> None:
        self.num_pairs = self.source_tokens = self.target_tokens = 0
        self.target_bytes = self.skipped = 0
        self._tokenizer = tokenizer
        self._block_length = block_length
        self._dtype = token_dtype(smallest_dtype(tokenizer.vocab_size))

    def pairs(
        self, files: Sequence[PairFiles], progress: Progress
    ) -> Iterator[tuple[Tokens, Tokens]]:
        """Yield the tokens of source and target, without end tokens."""
        progress("tokenizing pairs", 0, 1)
        for lines in _in_groups(_lines(files), _LINES_AT_ONCE):
            encoded = self._tokenizer.encode_batch(list(chain.from_iterable(lines)))
            for (_, target), ids in zip(lines, _in_groups(encoded, 2), strict=True):
                lengths = [len(text) + 1 for text in ids]
                if min(lengths) == 1 or max(lengths) > self._block_length:
                    self.skipped += 1
                    continue
                self.num_pairs += 1
                self.source_tokens += lengths[0]
                self.target_tokens += lengths[1]
                self.target_bytes += len(target.encode())
                one, other = (np.asarray(text, self._dtype) for text in ids)
                yield one, other
        progress("tokenizing pairs", 1, 1)

    def manifest(
        self, tokenizer_sha256: str, shards: tuple[ShardEntry, ...], pairs_per_shard: int
    ) -> PairManifest:
        """Build the manifest of the pairs encoded so far."""
        return PairManifest(
            kind="pairs",
            format_version=1,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            block_length=self._block_length,
            dtype=smallest_dtype(self._tokenizer.vocab_size),
            shards=shards,
            pairs_per_shard=pairs_per_shard,
            pairs=self.num_pairs,
            source_tokens=self.source_tokens,
            target_tokens=self.target_tokens,
            target_bytes=self.target_bytes,
            skipped=self.skipped,
        )
