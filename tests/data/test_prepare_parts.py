"""Parts, joined, are what one process makes, byte for byte, wherever and however they were made."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from moa_dist.data.division import divide
from moa_dist.data.prepare import prepare
from moa_dist.data.prepare_parts import PART_FILE, join_parts, prepare_part
from moa_dist.data.text import read_documents, read_spans
from moa_dist.data.text_options import TextCounts, TextOptions
from tests.data.test_prepare import contents
from tests.raises import raises_data_error

OPTIONS: dict[str, Any] = {"block_length": 16, "samples_per_shard": 50}


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind that can be divided, of one that cannot, and empty ones."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text("\n\n \n".join(documents) * 2, encoding="utf-8")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "d.txt").touch()
    (folder / "e.csv").write_text("text\none\ntwo\n")
    (folder / "f.txt").write_text("\ufeff" + "\n".join(documents[:40]), encoding="utf-8")
    (folder / "g.txt").touch()
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare([str(corpus)], folder / "out", block_length=16, vocab_size=400)
    return folder / "out"


def in_parts(corpus: Path, output: Path, num_parts: int, **options: Any) -> Path:
    """Prepare all parts, in no order; return their folder."""
    for number in random.Random(num_parts).sample(range(1, num_parts + 1), num_parts):
        prepare_part([str(corpus)], output, number, num_parts, **(OPTIONS | options))
    return output.with_name(f"{output.name}.parts")


@pytest.mark.parametrize("rule", ["file", "blank-line", "line"])
@pytest.mark.parametrize("valid_share", [0.0, 0.1])
def test_joined_parts_equal_one_process(
    corpus: Path, tokenizer: Path, tmp_path: Path, rule: Any, valid_share: float
) -> None:
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "valid_share": valid_share,
        "seed": 3,
        "text": TextOptions(rule),
    }
    whole = prepare([str(corpus)], tmp_path / "whole", **OPTIONS, **options)
    for num_parts in (1, 2, 4, 7):
        parts = in_parts(corpus, tmp_path / f"{num_parts}", num_parts, **options)
        joined = join_parts(parts, tmp_path / "joined", force=True)
        assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
        assert joined.counts == whole.counts
        assert joined.held_out == whole.held_out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["blank-line", "line"])
def test_every_document_is_in_one_part(corpus: Path, tmp_path: Path, seed: int, rule: Any) -> None:
    """Also with borders inside of characters, lines and runs of blank lines."""
    rng = random.Random(seed)
    text = "".join(
        rng.choices(["\n", "\r\n", " \n", "é", "🚢", "word ", "\u3000\n", "\x0b\n"], k=400)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(50)))
    files, options = sorted(tmp_path.iterdir()), TextOptions(rule)
    whole = ["".join(pieces) for pieces in read_documents(files, options, TextCounts())]
    for num_parts in (2, 3, 10, 200):
        counts, found = TextCounts(), []
        for number in range(1, num_parts + 1):
            spans = divide(files, options, number, num_parts)
            found += ["".join(pieces) for pieces in read_spans(spans, options, counts)]
        assert found == whole
        assert counts.input_bytes == sum(file.stat().st_size for file in files)


def test_large_files_are_divided_evenly(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 10_000)
    spans = [divide([tmp_path / "a.jsonl"], TextOptions(), n, 4) for n in (1, 2, 3, 4)]
    assert [span.size // 1000 for (span,) in spans] == [57, 57, 57, 57]


@pytest.mark.parametrize("size", [5_000, 30_000])
def test_the_end_of_the_longest_document_is_held_out_of_its_part(
    tokenizer: Path, tmp_path: Path, size: int
) -> None:
    words = ["river", "stone", "cloud\n", "bright", "seven"]
    for name, length in (("a", size // 3), ("b", size), ("c", size), ("d", 20)):
        text = " ".join(random.Random(length).choices(words, k=length))
        (tmp_path / f"in-{name}.txt").write_text(text)  # b and c are equal
    inputs = sorted(map(str, tmp_path.glob("in-*.txt")))
    options = OPTIONS | {"tokenizer": tokenizer, "valid_share": 1e-6, "block_length": 64}
    whole = prepare(inputs, tmp_path / "whole", **options)
    for number in (1, 2, 3):
        prepare_part(inputs, tmp_path / "out", number, 3, **options)
    joined = join_parts(tmp_path / "out.parts", tmp_path / "out")
    assert "the end of the longest" in str(joined.held_out)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert joined.counts == whole.counts

    (tmp_path / "in-b.txt").write_text("something else")
    with raises_data_error(key="--input"):
        join_parts(tmp_path / "out.parts", tmp_path / "again")


def test_messages_count_lines_from_the_beginning_of_the_file(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "some words"}'] * 1000
    lines[700] = lines[720] = "{no JSON"
    file.write_text("\n".join(lines))
    options = OPTIONS | {"tokenizer": tokenizer}
    with raises_data_error(path=file, line=701):
        prepare_part([str(file)], tmp_path / "out", 3, 4, **options)
    options["text"] = TextOptions(bad_lines="skip")
    counts = prepare_part([str(file)], tmp_path / "out", 3, 4, **options).part.counts
    assert counts.bad_lines == 2
    assert "line 701" in counts.first_bad_line


def test_parts_that_do_not_belong_together_are_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    output, options = tmp_path / "out", {"tokenizer": tokenizer}
    with raises_data_error(path=tmp_path / "out.parts", key="--join"):
        join_parts(tmp_path / "out.parts", output)
    parts = in_parts(corpus, output, 3, **options)

    shutil.move(parts / "2-of-3", tmp_path / "away")
    with raises_data_error("missing: 2 of 3", path=parts, key="--join"):
        join_parts(parts, output)
    shutil.copytree(tmp_path / "away", parts / "2-of-3")
    (parts / "2-of-3" / PART_FILE).unlink()
    with raises_data_error("unfinished: 2-of-3", path=parts, key="--join"):
        join_parts(parts, output)
    prepare_part([str(corpus)], output, 2, 3, **(OPTIONS | options | {"seed": 5}))
    with raises_data_error("--seed", path=parts / "2-of-3", key="--join"):
        join_parts(parts, output)
    with raises_data_error("--seed", path=parts / "2-of-3", key="--force"):
        prepare_part([str(corpus)], output, 2, 3, **(OPTIONS | options))
    prepare_part([str(corpus)], output, 2, 3, **(OPTIONS | options | {"force": True}))
    tokens = parts / "2-of-3" / "tokenized" / "tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\0\1")
    with raises_data_error(path=tokens, key="sha256"):
        join_parts(parts, output)
    assert not output.exists()


def test_parts_made_elsewhere_join(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The inputs lie in another folder there, and were copied at another time."""
    shutil.copytree(corpus, tmp_path / "copy", copy_function=shutil.copyfile)
    options = OPTIONS | {"tokenizer": tokenizer}
    prepare_part([str(corpus)], tmp_path / "a", 1, 2, **options)
    prepare_part([str(tmp_path / "copy")], tmp_path / "b", 2, 2, **options)
    shutil.move(tmp_path / "b.parts" / "2-of-2", tmp_path / "a.parts")
    join_parts(tmp_path / "a.parts", tmp_path / "a")
    prepare([str(corpus)], tmp_path / "whole", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (3, {}),
        (0, {}),
        (1, {"tokenizer": None}),
        (1, {"text": TextOptions(max_bytes=100)}),
    ],
)
def test_impossible_parts(
    corpus: Path, tokenizer: Path, tmp_path: Path, number: int, options: dict[str, Any]
) -> None:
    with raises_data_error(key="--part"):
        prepare_part(
            [str(corpus)],
            tmp_path / "out",
            number,
            2,
            **(OPTIONS | {"tokenizer": tokenizer} | options),
        )
    assert list(tmp_path.iterdir()) == []
