"""Ranks let torch's allocator grow its segments, unless the user has configured it."""

import importlib.util
import os
from pathlib import Path
from unittest import mock

import pytest

TRAIN = Path(__file__).parents[2] / "launcher/train.py"
GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, GROWS),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, {}),
    ],
)
def test_segments_grow_unless_configured(train, given, added):
    with mock.patch.dict(os.environ, given, clear=True):
        train.let_segments_grow()
        assert dict(os.environ) == given | added
