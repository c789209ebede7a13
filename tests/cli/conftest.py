import pytest

from tests.evaluate.runs import make_run, one_thread


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with `run`, of two checkpoints, and its `data`; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder)
    with one_thread():
        yield folder
