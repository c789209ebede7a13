"""The prepare command: its arguments reach the data, progress and summary are printed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moa_dist.cli import prepare as command
from moa_dist.data.manifest import load_manifest
from moa_dist.data.output_folder import check_output
from moa_dist.errors import DataError


def test_command(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    output = tmp_path / "out"
    arguments = f"--input {text_file} --output {output} --vocab-size 300 --sequence-length 8"
    arguments += " --documents blank-line --valid-share 0.3 --samples-per-shard 20 --seed 4"
    arguments += " --max-bytes 20000 --errors replace"
    assert command.run(parser.parse_args(arguments.split())) == 0

    train, valid = load_manifest(output / "train"), load_manifest(output / "valid")
    assert (train.block_length, train.vocab_size, train.seed) == (8, 300, 4)
    assert train.samples_per_shard <= 20
    assert 19_997 <= train.text_bytes + valid.text_bytes <= 20_000
    printed = capsys.readouterr()
    for value in (train.documents + valid.documents, train.tokens, valid.tokens):
        assert f"{value:,}" in printed.out
    assert f"{valid.bytes_per_token:.2f}" in printed.out
    stages = re.findall(r"([a-z ]+): 100\.0 %", printed.err)
    assert len(stages) == len(set(stages)) == 6, "each stage ends once"


def test_an_output_that_is_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of a container is, which no folder can replace by being renamed."""
    check_output(tmp_path, force=False)
    mounted = [SimpleNamespace(mountpoint=str(tmp_path))]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounted)
    with pytest.raises(DataError) as refused:
        check_output(tmp_path, force=False)
    assert str(tmp_path / "data") in str(refused.value)
