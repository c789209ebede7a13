import pytest

from tests.evaluate.runs import make_run, one_thread


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder with `data` and a `run` of two checkpoints; tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder)
    with one_thread():
        yield folder
