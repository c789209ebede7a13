"""A run or a checkpoint is found by its folder, or the message says what to give instead."""

import pytest

from moa_dist.evaluate.trained import find_checkpoint
from tests.raises import raises_data_error


@pytest.fixture
def run(tmp_path):
    for step in (3, 20, 100):
        (tmp_path / f"runs/one/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "runs/one/step-00000200.partial").mkdir()
    (tmp_path / "runs/empty").mkdir()
    return tmp_path / "runs/one"


def test_newest_of_a_run(run):
    assert find_checkpoint(run) == run / "step-00000100"


def test_a_checkpoint_itself(run, monkeypatch):
    assert find_checkpoint(run / "step-00000003") == run / "step-00000003"
    monkeypatch.chdir(run / "step-00000020")
    assert find_checkpoint(run / "step-00000020" / ".") == run / "step-00000020"
    (run / "best").symlink_to(run / "step-00000003")
    assert find_checkpoint(run / "best") == run / "step-00000003"


def test_folder_of_runs_names_one(run):
    with raises_data_error(run, path=run.parent, key="checkpoint.every"):
        find_checkpoint(run.parent)


def test_run_without_checkpoint_says_when_it_saves(run):
    with raises_data_error("`checkpoint.every`", path=run.parent / "empty"):
        find_checkpoint(run.parent / "empty")


def test_missing_folder(run):
    with raises_data_error(path=run.parent / "two", key=None):
        find_checkpoint(run.parent / "two")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "config.yaml").touch()
    with raises_data_error(path=tmp_path / "config.yaml", key=None):
        find_checkpoint(tmp_path / "config.yaml")
