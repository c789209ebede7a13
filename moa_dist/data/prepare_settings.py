"""Everything that the result of a `prepare` depends on, to continue or join only what fits.

Inputs are known by name, size and time of change, or by checksum where they came through a pipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers
from pydantic import BaseModel, ConfigDict

from moa_dist.data.manifest import file_sha256, smallest_dtype, token_dtype
from moa_dist.data.text_options import TextOptions
from moa_dist.data.tokenizer import Tokenizer
from moa_dist.errors import DataError

VERSION = f"1, tokenizers {tokenizers.__version__}"
"""Version of the files of unfinished work, and of the library whose tokens they hold."""
SETTINGS_FILE = "settings.json"
_OPTIONS = {
    "block_length": "--sequence-length",
    "tokenizer": "--tokenizer",
    "version": "the version of moa-dist or tokenizers",
    "inputs": "the input files",
    "tokenizer_sample_bytes": "the size of the tokenizer's sample",
}
"""What differs, in a message; other names are those of their options."""


class InputFile(BaseModel):
    """Identifies a file of the input."""

    model_config = ConfigDict(frozen=True)

    path: str
    """The path by which it was read."""
    size: int
    """Bytes."""
    mtime_ns: int = 0
    """When it was changed; 0 for the copy of a stream."""
    sha256: str = ""
    """Checksum of the copy of a stream."""


class Settings(BaseModel):
    """Holds all options and inputs of a `prepare`."""

    model_config = ConfigDict(frozen=True)

    block_length: int
    samples_per_shard: int
    valid_share: float
    seed: int
    text: TextOptions
    tokenizer: str | None
    """Checksum of the given tokenizer, or None to train one."""
    vocab_size: int | None
    """Size of the tokenizer to train."""
    tokenizer_sample_bytes: int | None
    """Text to train it on."""
    inputs: tuple[InputFile, ...] = ()
    """The files, in order."""
    version: str = VERSION
    """What tokenized the text."""

    def check(self) -> None:
        """Raise DataError for options that are out of range."""
        max_bytes = self.text.max_bytes
        max_bytes_wrong = max_bytes is not None and max_bytes < 4
        checks = [
            (self.block_length < 1, "--sequence-length", self.block_length, "at least 1"),
            (
                self.samples_per_shard < 1,
                "--samples-per-shard",
                self.samples_per_shard,
                "at least 1",
            ),
            (not 0 <= self.valid_share < 1, "--valid-share", self.valid_share, "from 0 to below 1"),
            (not 0 <= self.seed < 2**63, "--seed", self.seed, "from 0 to below 2^63"),
            (max_bytes_wrong, "--max-bytes", max_bytes, "at least 4"),
        ]
        problems = [
            DataError(f"{option} {value}: must be {allowed}", key=option)
            for wrong, option, value, allowed in checks
            if wrong
        ]
        if problems:
            raise DataError("; ".join(map(str, problems)), key=problems[0].key, causes=problems)

    def differences(self, other: Settings) -> list[str]:
        """Name the options in which two settings differ."""
        return list(_differences(self._flat(), other._flat()))

    def anywhere(self) -> Settings:
        """Return the settings without folders and times of the inputs, which machines differ in."""
        inputs = (
            file.model_copy(update={"path": Path(file.path).name, "mtime_ns": 0})
            for file in self.inputs
        )
        return self.model_copy(update={"inputs": tuple(inputs)})

    def _flat(self) -> dict[str, object]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {**values, **asdict(self.text), "text": None}


def _differences(one: dict[str, object], other: dict[str, object]) -> Iterator[str]:
    for name, value in one.items():
        if value != other.get(name):
            yield _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def describe_inputs(files: Sequence[Path], spool: Path) -> tuple[InputFile, ...]:
    """Identify files; those in the folder of `spool` are copies of streams."""
    return tuple(_describe(file, file.parent == spool.parent) for file in files)


def _describe(file: Path, is_copy: bool) -> InputFile:
    status = file.stat()
    if not is_copy:
        return InputFile(path=str(file), size=status.st_size, mtime_ns=status.st_mtime_ns)
    return InputFile(path="-", size=status.st_size, sha256=file_sha256(file))


def stored_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Return the type in which the tokens of a tokenizer are stored."""
    return token_dtype(smallest_dtype(tokenizer.vocab_size))
