"""Text to shards: `text -> tokens -> shuffled, packed samples -> tar shards + manifest`.

Everything is written to a hidden folder beside the output, which takes its place at the very
end: an interrupted run never leaves a folder that looks complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moa_dist.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    save_manifest,
    sha256_of,
    smallest_dtype,
)
from moa_dist.data.packing import TokenFile, write_shards
from moa_dist.data.text import TextCounts, TextOptions, find_files, read_documents
from moa_dist.data.tokenizer import (
    DEFAULT_SAMPLE_BYTES,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    sample_text,
    train_tokenizer,
)
from moa_dist.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done so far, in all)."""

DEFAULT_SAMPLES_PER_SHARD = 4096
_SPLITS = ("train", "valid")
_OUR_FILES = re.compile(
    rf"({re.escape(MANIFEST_FILE)}|{re.escape(TOKENIZER_FILE)}|shard-\d+\.tar)\Z"
)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made."""

    manifests: dict[Path, Manifest]
    """The manifest of each folder of shards."""
    counts: TextCounts
    """What the text held."""


def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    block_length: int,
    vocab_size: int = 8000,
    tokenizer: Path | None = None,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    valid_share: float = 0.0,
    seed: int = 0,
    text: TextOptions | None = None,
    tokenizer_sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
    stdin: BinaryIO | None = None,
) -> Prepared:
    """Turn text into a folder of shards with a manifest and a tokenizer.

    The same inputs and options give byte-identical files.

    Args:
        inputs: files, folders, or `-` for stdin.
        output: folder to make. With a validation share it holds `train` and `valid`, each a
            folder of shards of its own with the same tokenizer.
        block_length: tokens per sequence (L); a sample stores one more.
        vocab_size: size of the tokenizer that is trained when `tokenizer` is None.
        tokenizer: `tokenizer.json` to use instead, or a folder that holds one.
        samples_per_shard: the most samples in a shard.
        valid_share: share of the documents held out. The text of a document decides, so equal
            documents never end up on both sides.
        seed: of the tokenizer's sample, the held-out documents and the order of documents.
        text: how files become documents; None for the defaults of `TextOptions`.
        tokenizer_sample_bytes: the most text that a tokenizer is trained on.
        force: replace an output that an earlier run made.
        progress: called while working.
        stdin: where the input `-` is read from; None for the process's own.

    Raises:
        DataError: the text cannot be read or is too little, an option does not fit, or the
            output exists.
    """
    options = text or TextOptions()
    _check_options(block_length, samples_per_shard, valid_share, seed, options.max_bytes)
    check_output(output, force)
    with partial_folder(output) as partial:
        work = partial / "work"
        work.mkdir()
        reader = _Reader(
            find_files(inputs, stdin, work / "stdin.txt"), options, seed, valid_share, progress
        )
        if tokenizer is None:
            used = reader.train_tokenizer(vocab_size, tokenizer_sample_bytes)
        else:
            used = load_tokenizer(tokenizer)
        token_files, counts = reader.tokenize(used, work)
        manifests = {}
        for split, tokens in token_files.items():
            folder = partial / split
            folder.mkdir(exist_ok=True)
            manifests[output / split] = _write_split(
                tokens, folder, used, split, block_length, samples_per_shard, seed, progress
            )
        shutil.rmtree(work)
        put_in_place(partial, output)
    return Prepared(manifests, counts)


@dataclass(frozen=True)
class _Reader:
    """Reads the text, twice when a tokenizer is trained on it first."""

    files: Sequence[Path]
    options: TextOptions
    seed: int
    valid_share: float
    progress: Progress

    def train_tokenizer(self, vocab_size: int, sample_bytes: int) -> Tokenizer:
        documents = self._documents("sampling text for the tokenizer", TextCounts())
        sample = sample_text(
            (text for text, _, split in documents if split != "valid"), sample_bytes, self.seed
        )
        self.progress("training the tokenizer", 0, 1)
        trained = train_tokenizer(sample, vocab_size)
        self.progress("training the tokenizer", 1, 1)
        return trained

    def tokenize(self, tokenizer: Tokenizer, work: Path) -> tuple[dict[str, TokenFile], TextCounts]:
        """Token file of each split; the only split of an undivided text is named "."."""
        counts = TextCounts()
        splits = _SPLITS if self.valid_share else (".",)
        with ExitStack() as stack:
            files = {
                split: stack.enter_context(TokenFile(work / f"tokens{number}", tokenizer))
                for number, split in enumerate(splits)
            }
            for text, text_bytes, split in self._documents("tokenizing", counts):
                files[split].add(text, text_bytes)
        return files, counts

    def _documents(self, what: str, counts: TextCounts) -> Iterator[tuple[str, int, str]]:
        """Each document with its bytes and its split."""
        if self.options.max_bytes is None:
            total = sum(file.stat().st_size for file in self.files)
        else:
            total = self.options.max_bytes
        for text, text_bytes in read_documents(self.files, self.options, counts):
            yield text, text_bytes, self._split_of(text)
            limited = self.options.max_bytes is not None
            self.progress(what, counts.text_bytes if limited else counts.input_bytes, total)
        self.progress(what, total, total)

    def _split_of(self, text: str) -> str:
        if not self.valid_share:
            return "."
        key = str(self.seed).encode()
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        return "valid" if int.from_bytes(digest) < self.valid_share * 2**64 else "train"


def _write_split(
    tokens: TokenFile,
    folder: Path,
    tokenizer: Tokenizer,
    split: str,
    block_length: int,
    samples_per_shard: int,
    seed: int,
    progress: Progress,
) -> Manifest:
    name = "shards" if split == "." else f"{split} shards"
    try:
        packed = write_shards(
            tokens,
            folder,
            block_length=block_length,
            target=samples_per_shard,
            seed=seed,
            progress=lambda done, total: progress(f"writing {name}", done, total),
        )
    except DataError as error:
        if split == "valid":
            raise DataError(f"validation split: {error}, or a larger --valid-share") from error
        raise
    tokenizer_json = tokenizer.to_json().encode()
    (folder / TOKENIZER_FILE).write_bytes(tokenizer_json)
    manifest = Manifest(
        format_version=1,
        tokenizer_sha256=sha256_of(tokenizer_json),
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        block_length=block_length,
        dtype=smallest_dtype(tokenizer.vocab_size),
        samples_per_shard=packed.samples_per_shard,
        shards=packed.shards,
        documents=len(tokens.ends),
        tokens=tokens.num_tokens,
        text_bytes=tokens.text_bytes,
        dropped_tokens=packed.dropped_tokens,
        seed=seed,
    )
    save_manifest(manifest, folder)
    return manifest


def _check_options(
    block_length: int, samples_per_shard: int, valid_share: float, seed: int, max_bytes: int | None
) -> None:
    problems = [
        (block_length < 1, f"--sequence-length {block_length}: must be at least 1"),
        (samples_per_shard < 1, f"--samples-per-shard {samples_per_shard}: must be at least 1"),
        (not 0 <= valid_share < 1, f"--valid-share {valid_share}: must be from 0 to below 1"),
        (not 0 <= seed < 2**63, f"--seed {seed}: must be from 0 to below 2^63"),
        (max_bytes is not None and max_bytes < 4, f"--max-bytes {max_bytes}: must be at least 4"),
    ]
    found = [message for wrong, message in problems if wrong]
    if found:
        raise DataError("; ".join(found))


def check_output(output: Path, force: bool) -> None:
    """Raise DataError if the folder exists and must not be replaced."""
    try:
        if not output.exists():
            return
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}; choose another --output") from error
    if not output.is_dir():
        raise DataError(f"{output}: exists and is no folder; choose another --output")
    if not any(output.iterdir()):
        return
    if not _made_by_prepare(output):
        # Even with --force: nobody's other files are ever deleted.
        raise DataError(
            f"{output}: holds files that moa-dist prepare did not write; choose another --output"
        )
    if not force:
        raise DataError(
            f"{output}: already holds prepared data; use --force to replace it, or choose "
            "another --output"
        )


def _made_by_prepare(folder: Path) -> bool:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name in _SPLITS:
            if not all(_OUR_FILES.match(inner.name) for inner in entry.iterdir()):
                return False
        elif not _OUR_FILES.match(entry.name):
            return False
    return True


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed if anything goes wrong."""
    partial = output.absolute().with_name(f".{output.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error}); choose another --output") from error
    try:
        yield partial
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error}); free some space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, output: Path) -> None:
    """Move the finished folder to where it belongs."""
    if output.is_dir() and any(output.iterdir()):
        # The old data stays whole until the new data is complete beside it.
        old = partial.with_name(f"{partial.name}-old")
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
