"""Memory does not grow with the text, whether it is one document or many.

With every buffer made small; `tests/benchmarks/prepare.py` tries 4 GB with buffers as they are.
"""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from moa_dist.data import shuffle, token_store
from moa_dist.data.prepare import prepare
from moa_dist.data.text_options import TextOptions
from tests.benchmarks.prepare import random_text, write_text

SPAWNED = multiprocessing.get_context("forkserver")
SMALL, LARGE = 1_000_000, 12_000_000


def peak_of(connection: Connection, file: Path, output: Path, rule: Any, tokenizer: Path) -> None:
    """Send by how many bytes the memory of this process grows."""
    token_store._BATCH_BYTES, token_store._SAVE_BYTES = 1 << 18, 1 << 20
    token_store._RECORDS_AT_ONCE = 1 << 12
    shuffle._BUCKET_BYTES, shuffle._TOKENS_AT_ONCE = 1 << 18, 1 << 14
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(
        [str(file)],
        output,
        block_length=32,
        samples_per_shard=1000,
        tokenizer=tokenizer,
        valid_share=0.1,
        text=TextOptions(rule),
    )
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


@pytest.mark.full
@pytest.mark.parametrize("rule", ["file", "line"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, rule: str) -> None:
    block = random_text(1 << 20, 12).encode()
    (tmp_path / "sample.txt").write_bytes(block)
    prepare([str(tmp_path / "sample.txt")], tmp_path / "tokenizer", block_length=32)
    peaks = {}
    for size in (SMALL, LARGE):
        write_text(tmp_path / f"{size}.txt", block, size)
        receiver, sender = SPAWNED.Pipe(duplex=False)
        arguments = (tmp_path / f"{size}.txt", tmp_path / f"{size}", rule, tmp_path / "tokenizer")
        process = SPAWNED.Process(target=peak_of, args=(sender, *arguments))
        process.start()
        peaks[size] = receiver.recv()
        process.join()
    assert peaks[LARGE] - peaks[SMALL] < (LARGE - SMALL) / 4
