"""Generates the code that transformers runs for an export: this package's own modules, flattened.

transformers runs Python files that lie next to the weights (`trust_remote_code`), and finds those
that belong together by the relative imports in them, all in one folder. So every module that
`modeling` imports, directly or not, becomes a file, `moa_dist.models.stack` becoming
`moa_dist_models_stack.py`, in which imports of the package are relative ones. Nothing else changes
but the names of operators: several exports, and the package itself, may be loaded in one process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import nn

from moa_dist import __version__

ROOT = "moa_dist.evaluate.modeling"
"""The module whose classes transformers uses."""
_PACKAGE = __name__.partition(".")[0]
_OPERATORS = f'"{_PACKAGE}::'
"""How the name of an operator of the package begins in its sources."""
_OWN_OPERATORS = f'f"{_PACKAGE}_{{__package__.encode().hex()}}::'


class _Edit(NamedTuple):
    """A replacement of some lines of a source."""

    first: int
    """First line, counted from 0."""
    end: int
    """Line after the last."""
    text: str
    """What stands there instead, without a newline at its end."""


def flat_name(module: str) -> str:
    """Return the name of a module among the generated files."""
    return module.replace(".", "_")


def write_code(folder: Path, model: nn.Module) -> None:
    """Write the code of `model`, a `LanguageModel`, into `folder`."""
    for name, text in generate_code(_kinds_elsewhere(model)).items():
        (folder / name).write_text(text, encoding="utf-8")


def generate_code(others: Iterable[str] = ()) -> dict[str, str]:
    """Return the content of all files by name: of `ROOT` and all it needs, and of other modules.

    `others` are modules that define kinds outside the package; `ROOT` imports them at its end.
    """
    others = tuple(others)
    packages = {name.partition(".")[0] for name in (ROOT, *others)}
    found: dict[str, str] = {}
    waiting = [ROOT, *others]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        source = _source(module)
        edits: list[_Edit] = []
        for node in ast.walk(ast.parse(source)):
            edit, imported = _flatten(node, source, packages)
            edits += edit
            waiting += imported
        found[module] = _edited(source, edits)
    found[ROOT] += "".join(f"\n{_copied(module)}\n" for module in others)
    return {
        f"{flat_name(module)}.py": _header(module) + text.replace(_OPERATORS, _OWN_OPERATORS)
        for module, text in sorted(found.items())
    }


def _kinds_elsewhere(model: nn.Module) -> list[str]:
    """Return the modules, neither of torch nor of the package, that the model's parts come from."""
    modules = {type(part).__module__ for part in model.modules()}
    return sorted(m for m in modules if m.partition(".")[0] not in ("torch", _PACKAGE))


def _flatten(
    node: ast.AST, source: str, packages: set[str]
) -> tuple[Iterator[_Edit], Iterable[str]]:
    """Rewrite an import of the packages; returns edits, and the modules that it imports."""
    if isinstance(node, ast.Import):
        absolute = [alias.name for alias in node.names if alias.name.partition(".")[0] in packages]
        assert not absolute, f"write `from ... import ...` instead of `import {absolute[0]}`"
    if not isinstance(node, ast.ImportFrom):
        return iter(()), ()
    assert not node.level, "relative imports are not used in the package"
    assert node.module is not None
    if node.module.partition(".")[0] not in packages:
        return iter(()), ()
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    if not any(map(_is_module, submodules)):
        return _relative(node, node.module, source), [node.module]
    assert all(map(_is_module, submodules)), f"import modules of {node.module} by themselves"
    return _of_modules(node), submodules


def _relative(node: ast.ImportFrom, module: str, source: str) -> Iterator[_Edit]:
    line = source.splitlines()[node.lineno - 1]
    relative = line.replace(f"from {module} ", f"from .{flat_name(module)} ", 1)
    yield _Edit(node.lineno - 1, node.lineno, relative)


def _of_modules(node: ast.ImportFrom) -> Iterator[_Edit]:
    lines = []
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        lines.append(_copied(module))
        lines.append(f"from . import {flat_name(module)} as {alias.asname or alias.name}")
    assert node.end_lineno is not None
    indent = " " * node.col_offset
    yield _Edit(node.lineno - 1, node.end_lineno, "\n".join(indent + line for line in lines))


def _copied(module: str) -> str:
    """Write an import in the one form that makes transformers copy a module's file."""
    return f"from .{flat_name(module)} import __name__ as _copied"


def _edited(source: str, edits: list[_Edit]) -> str:
    lines = source.splitlines()
    for edit in sorted(edits, reverse=True):
        lines[edit.first : edit.end] = [edit.text]
    return "\n".join(lines) + "\n"


def _header(module: str) -> str:
    path = f"{module.replace('.', '/')}.py"
    return f"# Generated by moa-dist {__version__} from {path}: edit that file and export again.\n"


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
