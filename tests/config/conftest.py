"""A complete small configuration, and shorthands to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.errors import ConfigError, Problem

BASE = """\
name: base
model:
  vocab_size: 100
  d_model: 32
  num_layers: 4
  num_distinct_layers: 2
  attention:
    kind: switchhead
    num_heads: 2
    d_head: 16
    router: {num_experts: 4, top_k: 2, score: sigmoid}
  ffn:
    kind: moe
    d_expert: 16
    router: {num_experts: 8, top_k: 2, score: sigmoid}
data:
  train: data/train
  sequence_length: 16
parallel:
  expert_parallel: 2
train:
  steps: 100
  global_batch: 8
  micro_batch: 4
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a YAML file; all files of a test lie in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "run.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_file


@pytest.fixture
def base(write: Callable[..., str]) -> str:
    """A complete configuration that is right."""
    return write(BASE, "base.yaml")


@pytest.fixture
def problems() -> Callable[..., list[Problem]]:
    """Problems that loading a path with overrides reports; fails if it reports none."""

    def load_and_fail(path: str, *overrides: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
        return caught.value.problems

    return load_and_fail
