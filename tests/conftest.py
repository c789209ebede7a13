"""What every test runs under: which tests a run takes, in which order, and on how many threads."""

import os

# Before anything imports Triton, which looks at it then: its kernels run on CPUs in tests.
os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pytest
import torch

from tests.cover import Cell, covering

MARKED_FOLDERS = ("distributed", "integration")
"""Folders of `tests/` whose tests are marked with the folder's name."""
LEFT_OUT = pytest.StashKey[int]()
"""How many tests this run leaves to --full."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run every test and every cell")
    parser.addoption("--kills", type=int, default=3, help="kills in integration/test_kills.py")


def pytest_report_header(config):
    if config.getoption("--full"):
        return "full run: every test, every cell"
    return "default run: no test marked full, pairwise covers of cells; --full runs everything"


@pytest.hookimpl(trylast=True)  # sees what -k and -m have left
def pytest_collection_modifyitems(config, items):
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    if not config.getoption("--full"):
        kept = default_run(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        config.stash[LEFT_OUT] = len(items) - len(kept)
        items[:] = [item for item in items if item in kept]
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        for item in items:  # ranks share pools, and a file its fixtures
            group = "ranks" if folders[item] == "distributed" else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
        items.sort(key=lambda item: folders[item] not in MARKED_FOLDERS)  # the longest first


def pytest_itemcollected(item):
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if folder in MARKED_FOLDERS:
        item.add_marker(folder)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error is None:
        node.config.stash[LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter, config):
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.line(f"{number} tests left out: --full runs them too")


def default_run(items):
    """Items of a run without --full: none marked `full`, and a cover of `pairwise` functions."""
    kept = {item for item in items if not item.get_closest_marker("full")}
    functions = {}
    for item in items:
        if item in kept and item.get_closest_marker("pairwise"):
            functions.setdefault((item.parent, item.function), []).append(item)
    for cells in functions.values():
        covered = {cells[i] for i in covering([cell_of(item) for item in cells])}
        kept -= set(cells) - covered
    return kept


def cell_of(item) -> Cell:
    """Values of the test's parameters; a parameter that is a cell itself gives its own.

    Values, since `callspec.indices` numbers the cells in recent versions of pytest.
    """
    cell = {}
    for name, value in item.callspec.params.items():
        cell |= value if isinstance(value, dict) else {name: value}
    return cell


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors in tests are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)
