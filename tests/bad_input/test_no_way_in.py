"""Nothing that the product reads can make it run code, and nothing it uses could."""

from __future__ import annotations

import ast
import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.errors import ConfigError
from tests.bad_input.shards import BOMB_FILE, Bomb

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "moa_dist").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")])
RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS_THAT_RUN_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "numpy.load", "np.load", "torch.hub.load", "torch.jit.load",
    "wds.WebDataset", "webdataset.WebDataset", "wds.gopen", "webdataset.gopen",
}  # fmt: skip
CALLS_THAT_WRITE_WHERE_AN_ARCHIVE_SAYS = {"extract", "extractall", "unpack_archive"}


def suspicious(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in RUN_CODE)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUN_CODE:
            yield f"from {node.module} import"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS_THAT_RUN_CODE:
            yield name
        if name.rpartition(".")[2] in CALLS_THAT_WRITE_WHERE_AN_ARCHIVE_SAYS:
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
            yield f"{name} with shell or allow_pickle"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_product_uses_nothing_that_runs_what_it_reads(source: Path) -> None:
    assert list(suspicious(source.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "tar.extractall(folder)",
        "subprocess.run(line, shell=True)",
        "np.load(path)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(suspicious(source))


def test_it_does_not_find_what_is_harmless() -> None:
    harmless = (
        "model.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nsubprocess.run(a)"
    )
    assert list(suspicious(harmless)) == []


def test_the_bomb_of_the_table_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / BOMB_FILE).is_dir()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [exploded]",
        "!!python/object/new:os.mkdir [exploded]",
        "!!python/object/apply:subprocess.run [[mkdir, exploded]]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [exploded]",
        "{!!python/object/apply:os.mkdir [exploded]: 1}",
        "$(mkdir exploded)",
        "`mkdir exploded`",
        "${HOME}",
    ],
)
def test_a_configuration_runs_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"name: {text}\n")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError):  # if only because the rest is missing
        load_config("run.yaml")
    with contextlib.suppress(ConfigError):
        load_config("empty.yaml", [f"name={text}"])
    assert not (tmp_path / BOMB_FILE).exists()
