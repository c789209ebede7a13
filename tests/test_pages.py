"""The pages say what is so: links resolve, files they name exist, commands they show are taken.

Commands are parsed by the real parsers, and configurations loaded with the overrides given.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moa_dist.bench.sections import SECTIONS, SHARED_SECTIONS
from moa_dist.cli.main import COMMANDS
from moa_dist.config import find_layout_problems, load_config

ROOT = Path(__file__).parents[1]
FOLDERS = ("", ".github", "configs", "configs/*", "docker", "launcher", "tests", "tests/*")
FOLDERS += ("moa_dist", "moa_dist/*")
PAGES = sorted(
    page
    for folder in FOLDERS
    for page in ROOT.glob(f"{folder}/*.md".lstrip("/"))
    if page.parent != ROOT / "moa_dist" / "configs"  # a link to configs/
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
WORDS_OF_README = 1000

LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./<-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|yaml|toml|css))\b")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"mine.yaml", "config.yaml"}
"""Files of a reader, or of a run's folder."""
CAPITALS = re.compile(r"[A-Z_]+")
"""They stand for something of the reader's: FILE, RUN, OUT, HOSTS."""


def prose(page: Path) -> str:
    """A page without the blocks that show output."""
    return re.sub(r"^```text\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may add after `#`, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find(name: str, page: Path) -> list[Path]:
    """Files that a page may mean: seen from its folder, the root or the package, or by their end.

    The pages name files of a package in passing, such as `train/engine.py`.
    """
    for start in (page.parent, ROOT, ROOT / "moa_dist", ROOT / "moa_dist" / "launch"):
        if (start / name).is_file():
            return [start / name]
    return [path for path in (ROOT / "moa_dist").rglob(Path(name).name) if str(path).endswith(name)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of every command in a block of shell."""
    for page, name in zip(PAGES, NAMES, strict=True):
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r" && | \| ", line):
                    words = shlex.split(part, comments=True)
                    if words:
                        yield name, words


COMMANDS_SHOWN = list(commands())


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text().split()) <= WORDS_OF_README


def test_every_package_that_needs_a_page_has_one():
    for folder in ("moe", "data", "kernels", "checkpoint"):
        assert f"moa_dist/{folder}/README.md" in NAMES
    for folder in ("moa_dist", "launcher", "configs", "docker", "tests"):
        assert f"{folder}/README.md" in NAMES


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_conflict_of_a_merge_is_left(page):
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page):
    for name in FILE.findall(prose(page)):
        if name in PLACEHOLDERS or "NAME" in name:
            continue
        assert find(name, page), f"{name} is no file"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_folders_exist(page):
    for name in re.findall(r"`((?:moa_dist|tests|configs|launcher|docker)/[\w/]*/)`", prose(page)):
        assert (ROOT / name).is_dir(), name


@pytest.mark.parametrize(("page", "words"), COMMANDS_SHOWN)
def test_commands_are_taken(page, words, monkeypatch):
    """None of them is run: only its parser is, and configurations are loaded."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]  # environment
    match words:
        case ["moa-dist", *arguments]:
            check_command(arguments)
        case ["deepspeed", *rest] if "moa-dist" in rest:
            assert "--no_python" in rest
            check_command(rest[rest.index("moa-dist") + 1 :])
        case ["python", "launcher/launch.py", *arguments]:
            check_launcher(arguments, monkeypatch)
        case ["python", "launcher/job.py", kind, *arguments]:
            check_job(kind, arguments)
        case [_, *rest] if "launcher/train.py" in rest:
            check_training(rest[rest.index("launcher/train.py") + 1 :], monkeypatch)
        case ["python", "-m", module, *_]:
            assert find_spec(module)
        case ["bash" | "source", script, *_]:
            assert script == ".venv/bin/activate" or (ROOT / script).is_file()
        case ["ruff" | "mypy" | "lint-imports" | "codespell", *_]:
            pass  # a tool of the development environment
        case ["docker" | "kubectl" | "pip" | "pre-commit", *rest]:
            for path in rest:
                assert "docker/" not in path or (ROOT / path).is_file()
        case _:
            pytest.fail(f"nobody knows whether this works: {shlex.join(words)}")


def check_command(arguments: list[str]) -> None:
    """One of `moa-dist`."""
    name, *rest = arguments
    assert name in COMMANDS
    if rest == ["--help"]:
        return
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)  # as `main` does
    args, unknown = parser.parse_known_args(rest)
    assert not any(word.startswith("-") for word in unknown), unknown
    given = vars(args)
    words = [*given.get("overrides", []), *unknown]
    file = given.get("config") or given.get("path")
    if str(file).endswith(".yaml"):
        sections = {*SECTIONS, *SHARED_SECTIONS} if name == "bench" else set()
        config = load_config(ROOT / str(file), [word for word in words if word not in sections])
        if given.get("world_size"):
            assert find_layout_problems(config, args.world_size) == []


def check_launcher(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"N": "2", "R": "1"}
    arguments = [numbers.get(word, word) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    args = runpy.run_path(str(ROOT / "launcher/launch.py"))["parse"]()
    load_unless_placeholder(args.config, args.overrides)


def check_job(kind: str, arguments: list[str]) -> None:
    job = runpy.run_path(str(ROOT / "launcher/job.py"))
    parser = argparse.ArgumentParser()
    job[f"_add_{kind}"](parser)
    args = parser.parse_intermixed_args(arguments)
    load_unless_placeholder(args.config, args.overrides)


def check_training(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train = runpy.run_path(str(ROOT / "launcher/train.py"))
    parsed: list[argparse.Namespace] = []
    train["main"].__globals__["run"] = lambda args, _: parsed.append(args)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train["main"]()
    (args,) = parsed
    load_unless_placeholder(args.config, args.overrides)


def load_unless_placeholder(file: str, overrides: list[str]) -> None:
    if not CAPITALS.fullmatch(file):
        load_config(ROOT / file, overrides)


def test_python_of_the_readme_runs(monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(block, names)
    *_, comment = block.rstrip().split("# ")
    assert comment == "logits, aux_losses, statistics"
    output = names["output"]
    assert output.logits.shape == (1, 16, names["config"].model.vocab_size)
    assert output.aux_losses.keys() == {"attention/entropy", "ffn/entropy"}
    assert output.statistics
