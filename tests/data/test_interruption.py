"""A `prepare` that is killed at any moment continues with the same command, to the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moa_dist.cli.main import main
from moa_dist.data import corpus as corpus_module
from moa_dist.data import token_store
from moa_dist.data.prepare import prepare
from moa_dist.data.prepare_parts import join_parts, prepare_part
from moa_dist.data.text_options import TextOptions
from moa_dist.data.token_store import POSITION_FILE, load_position
from moa_dist.data.work_folder import hidden_folder, work_folder
from moa_dist.errors import DataError
from tests.data.test_prepare import contents, nothing_but
from tests.raises import raises_data_error

OPTIONS: dict[str, Any] = {"block_length": 16, "samples_per_shard": 50}
FORKS = multiprocessing.get_context("forkserver")  # whose processes need no time to import
FORKS.set_forkserver_preload(["tests.data.test_interruption"])


def slowly(arguments: list[str]) -> None:
    """Run the command in this process, which is killed, and save the position very often."""
    token_store._BATCH_BYTES, token_store._SAVE_BYTES = 300, 900
    encode = token_store.TokenStore._encode_waiting

    def slow(store: token_store.TokenStore) -> None:
        encode(store)
        time.sleep(0.002)

    token_store.TokenStore._encode_waiting = slow  # type: ignore[method-assign]
    sys.exit(main(["prepare", *arguments]))


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of many documents, one that is a long document, and small ones."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(f'{{"text": "{n} {"word " * (n % 90)}"}}\n' for n in range(400))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text("\n".join(documents) * 10, encoding="utf-8")
    for number, text in enumerate(documents[:20]):
        (folder / f"c{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare([str(corpus)], folder / "out", block_length=16, vocab_size=400)
    return folder / "out"


def killed_until_done(arguments: list[str], output: Path | None, rng: random.Random) -> int:
    """Run the command, kill it, run it again, until it ends by itself; return the kills.

    Killed after it has put `output` in place, it is done too: run again, it would refuse that.
    """
    for kills in range(60):
        process = FORKS.Process(target=slowly, args=(arguments,))
        process.start()
        # Longer and longer, so that slow machines get there as well.
        process.join(rng.uniform(0, 0.3) * 1.15**kills)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return kills
        if output is not None and output.exists():
            shutil.rmtree(hidden_folder(output), ignore_errors=True)
            return kills + 1
    raise AssertionError("never got there")


@pytest.mark.full
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(
    corpus: Path, tokenizer: Path, tmp_path: Path, given: bool, seed: int
) -> None:
    options = ["--tokenizer", str(tokenizer)] if given else ["--vocab-size", "300"]
    arguments = ["--input", str(corpus), "--sequence-length", "16", "--samples-per-shard", "50"]
    arguments += ["--valid-share", "0.1", *options, "--output"]
    out = tmp_path / "out"
    kills = killed_until_done([*arguments, str(out)], out, random.Random(seed))
    assert kills > 0
    prepare(
        [str(corpus)],
        tmp_path / "whole",
        **OPTIONS,
        valid_share=0.1,
        tokenizer=tokenizer if given else None,
        vocab_size=300,
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert nothing_but("out", "whole", folder=tmp_path)


@pytest.mark.full
def test_parts_and_their_join_killed_at_random_moments(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    rng, output = random.Random(7), tmp_path / "out"
    parts = tmp_path / "out.parts"
    for number in (1, 2, 3):
        arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer)]
        arguments += ["--sequence-length", "16", "--samples-per-shard", "50"]
        arguments += ["--output", str(output), "--part", f"{number}/3"]
        killed_until_done(arguments, None, rng)
    killed_until_done(["--join", str(parts), "--output", str(output)], output, rng)
    prepare([str(corpus)], tmp_path / "whole", **OPTIONS, tokenizer=tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Stop(BaseException):
    """Stands for a kill."""


def stop_after(number: int) -> Any:
    """Return a progress function that raises at its n-th call while tokenizing."""
    calls = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += what == "tokenizing"
        if calls >= number:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("limit", "stops"),
    [
        (None, (1,)),
        (None, (150, 90)),
        (None, (300, 2, 350, 402)),
        (None, (404,)),
        (None, (415,)),
        (30_000, (100, 2, 120)),
    ],
)
def test_work_is_continued_and_not_repeated(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
    limit: int | None,
) -> None:
    text = TextOptions(max_bytes=limit)
    options = OPTIONS | {"tokenizer": tokenizer, "valid_share": 0.1, "text": text}
    whole = prepare([str(corpus)], tmp_path / "whole", **options)
    monkeypatch.setattr(token_store, "_BATCH_BYTES", 300)
    monkeypatch.setattr(token_store, "_SAVE_BYTES", 900)
    work = hidden_folder(tmp_path / "out") / "tokenized"
    before = 0
    for number in stops:
        with pytest.raises(Stop):
            prepare([str(corpus)], tmp_path / "out", **options, progress=stop_after(number))
        position = load_position(work)
        assert position.tokens >= before
        before = position.tokens
    encoded = 0
    encode = token_store.TokenStore._encode_waiting

    def counted(store: token_store.TokenStore) -> None:
        nonlocal encoded
        encoded -= store.position.tokens
        encode(store)
        encoded += store.position.tokens

    monkeypatch.setattr(token_store.TokenStore, "_encode_waiting", counted)
    prepared = prepare([str(corpus)], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert prepared.counts == whole.counts
    all_tokens = sum(manifest.tokens for manifest in whole.manifests.values())
    assert encoded == all_tokens - before
    assert before > 0 or stops == (1,)


def test_a_trained_tokenizer_is_not_trained_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"vocab_size": 300, "valid_share": 0.1}
    with pytest.raises(Stop):
        prepare([str(corpus)], tmp_path / "out", **options, progress=stop_after(50))
    with monkeypatch.context() as patched:
        patched.setattr(corpus_module, "train_tokenizer", None)
        prepare([str(corpus)], tmp_path / "out", **options)
    prepare([str(corpus)], tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "--seed"),
        ({"text": TextOptions("line")}, "--documents"),
        ({"vocab_size": 280}, "--vocab-size"),
        ("a file", "the input files"),
    ],
)
def test_other_options_or_inputs_start_anew(
    documents: list[str], tmp_path: Path, change: Any, named: str
) -> None:
    file, options = tmp_path / "a.txt", OPTIONS | {"vocab_size": 300}
    file.write_text("\n".join(documents))
    with pytest.raises(Stop):
        prepare([str(file)], tmp_path / "out", **options, progress=stop_after(1))
    if change == "a file":
        file.write_text("\n".join(documents[1:]))
    else:
        options |= change
    prepared = prepare([str(file)], tmp_path / "out", **options)
    assert prepared.discarded == [named]
    whole = prepare([str(file)], tmp_path / "whole", **options)
    assert whole.discarded == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_part_stays(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"tokenizer": tokenizer}
    made = prepare_part([str(corpus)], tmp_path / "out", 1, 1, **options)
    file = made.folder / "tokenized" / POSITION_FILE
    before = file.stat().st_mtime_ns
    assert prepare_part([str(corpus)], tmp_path / "out", 1, 1, **options).part == made.part
    assert file.stat().st_mtime_ns == before
    join_parts(made.folder.parent, tmp_path / "out")


def test_two_at_once_are_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        work_folder(hidden_folder(output), output),
        raises_data_error(path=output, key="--output"),
    ):
        prepare([str(corpus)], output, **OPTIONS, tokenizer=tokenizer)


def test_wrong_input_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{no JSON}\n")
    with pytest.raises(DataError):
        prepare([str(file)], tmp_path / "out", **OPTIONS)
    assert nothing_but("a.jsonl", folder=tmp_path)
