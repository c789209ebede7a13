"""A checkpoint that was moved to another disk, with a link in its place, is never lost there."""

from pathlib import Path

import pytest

from moa_dist.checkpoint.write import discard, move_into_place, remove_leftovers


@pytest.fixture
def moved(tmp_path) -> Path:
    """The checkpoint of step 4, elsewhere."""
    elsewhere = tmp_path / "other disk" / "s4"
    elsewhere.mkdir(parents=True)
    (elsewhere / "index.json").write_text("{}")
    (tmp_path / "run").mkdir()
    return elsewhere


def test_an_old_one_loses_its_link(tmp_path, moved):
    link = tmp_path / "run/step-00000004"
    link.symlink_to(moved)
    discard(link)
    assert list((tmp_path / "run").iterdir()) == []
    assert (moved / "index.json").exists()


def test_a_damaged_one_is_replaced(tmp_path, moved):
    link, partial = tmp_path / "run/step-00000004", tmp_path / "run/step-00000004.partial"
    link.symlink_to(moved)
    partial.mkdir()
    move_into_place(partial, link)
    assert not link.is_symlink()
    assert list((tmp_path / "run").iterdir()) == [link]
    assert (moved / "index.json").exists()


@pytest.mark.parametrize("ending", [".partial", ".replaced"])
def test_a_link_that_a_dead_job_left_is_removed(tmp_path, moved, ending):
    (tmp_path / "run/step-00000004").mkdir()
    (tmp_path / f"run/step-00000004{ending}").symlink_to(moved)
    remove_leftovers(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000004"]
    assert (moved / "index.json").exists()
