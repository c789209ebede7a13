"""A run folder that cannot be written stops every rank with one message."""

from functools import partial
from pathlib import Path

import pytest

from moa_dist.checkpoint.agreement import broadcast_from_rank0
from moa_dist.errors import DataError
from moa_dist.train.run_folder import describe_run
from tests.distributed.layouts import Case
from tests.small_shards import write_folder


def test_a_start_that_is_cut_short_spoils_nothing(tmp_path, monkeypatch):
    """Half a tokenizer.json would be that of another run, and resuming refused for ever."""
    write_folder(tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_text("{}")
    config = Case().config()
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": str(tmp_path / "data")})}
    )
    describe_run(config, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert before.keys() == {"config.yaml", "tokenizer.json", "manifest.json"}
    (tmp_path / "data/manifest.json").write_text("another")

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left on device"):
        describe_run(config, tmp_path / "run")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def begin(folder: Path) -> str:
    """On every rank: the message."""
    try:
        broadcast_from_rank0(partial(describe_run, Case().config(), folder))
    except DataError as error:
        return str(error)
    return "written"


def test_all_ranks_say_what_is_wrong_with_the_folder(pools, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder, cause in (("file/run", "Not a directory"), ("file", "File exists")):
        first, second = pools(2).run(begin, tmp_path / folder)
        assert first == second
        assert f"{tmp_path / folder}: {cause}" in first
        assert "`output`" in first
        assert "`name`" in first
