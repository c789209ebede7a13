"""A run folder that cannot be written stops every rank with one message."""

from functools import partial
from pathlib import Path

from moa_dist.errors import DataError
from moa_dist.train.checkpoint import from_rank_0
from moa_dist.train.trainer import describe_run
from tests.distributed.layouts import Case


def begin(folder: Path) -> str:
    """On every rank: the message."""
    try:
        from_rank_0(partial(describe_run, Case().config(), folder))
    except DataError as error:
        return str(error)
    return "written"


def test_all_ranks_say_what_is_wrong_with_the_folder(pools, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder, cause in (("file/run", "Not a directory"), ("file", "File exists")):
        first, second = pools(2).run(begin, tmp_path / folder)
        assert first == second
        assert f"{tmp_path / folder}: {cause}" in first
        assert first.endswith("choose another `output` or `name`")
