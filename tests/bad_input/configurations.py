"""Configurations that cannot be meant so."""

from __future__ import annotations

import os
from pathlib import Path

from tests.bad_input.case import BadInput, Make, Meet, command, file
from tests.config.conftest import BASE

CHECK = command("config", "check", "run.yaml")


def _text(name: str, text: str | bytes, *says: str) -> BadInput:
    return BadInput(name, file("run.yaml", text), CHECK, says)


def _override(name: str, override: str, *says: str) -> BadInput:
    return BadInput(name, file("run.yaml", BASE), _check_with(override), says)


def _check_with(override: str) -> Meet:
    return command("config", "check", "run.yaml", override)


def _chain(count: int, names: int) -> Make:
    """Files that each extend the next, `names` times over."""

    def make(folder: Path) -> None:
        for index in range(count):
            extended = ", ".join([f"{index + 1}.yaml"] * names)
            (folder / f"{index}.yaml").write_text(f"extends: [{extended}]\n")
        (folder / f"{count}.yaml").write_text(BASE)
        (folder / "run.yaml").write_text("extends: 0.yaml\n")

    return make


def _alias_bomb() -> str:
    lines = [f"a0: &a0 [{', '.join('x' * 9)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines)


CONFIGURATIONS = [
    _text("unknown key", BASE + "lerning_rate: 1\n", "run.yaml:25", "unknown key `lerning_rate`"),
    _text("key that stands twice", BASE + "name: x\n", "run.yaml:25", "`name` stands twice"),
    _text("tabs", "name: x\n\ttrain: 1\n", "run.yaml:2: not valid YAML"),
    _text("cut in the middle", BASE[:-20] + "[", "run.yaml:23: not valid YAML"),
    _text("empty file", "", "`name` is missing"),
    _text("binary file", bytes(range(256)), "cannot read run.yaml: not a UTF-8 text file"),
    _text("UTF-16", BASE.encode("utf-16"), "cannot read run.yaml: not a UTF-8 text file"),
    _text("Latin-1", "name: café".encode("latin-1"), "run.yaml: not a UTF-8 text file"),
    _text("NUL characters", "name: a\0b\n", "run.yaml: not valid YAML", "#x0000"),
    _text("a list", "- name\n", "run.yaml: must hold keys with values"),
    _text("two documents", BASE + "---\n" + BASE, "run.yaml:", "not valid YAML"),
    _text("aliases that multiply", _alias_bomb(), "run.yaml:1", "more than 10000 values"),
    _text("alias of itself", "a: &a [*a]\n", "run.yaml:1: an alias contains itself"),
    _text("nested too deeply", "[" * 9999, "run.yaml: nested too deeply"),
    _text("circle of extends", "extends: run.yaml\n", "goes in a circle: run.yaml -> run.yaml"),
    _text("extends nothing", "extends: no.yaml\n", "cannot read no.yaml", "extended by run.yaml"),
    _text("code in a tag", "a: !!python/object/apply:os.mkdir [x]\n", "run.yaml:1: the tag"),
    _text("path as a name", BASE.replace("base", "../x"), "`name`", "without slashes"),
    BadInput("extends without end", _chain(150, 1), CHECK, ("leads to more than 100 files",)),
    BadInput("extends that multiply", _chain(40, 2), CHECK, ("leads to more than 100 files",)),
    BadInput(
        "folder as configuration",
        lambda folder: (folder / "run.yaml").mkdir(),
        CHECK,
        ("cannot read run.yaml: Is a directory",),
    ),
    BadInput("no configuration", lambda folder: None, CHECK, ("cannot read run.yaml: No such",)),
    BadInput(
        "dangling link",
        lambda folder: os.symlink("gone", folder / "run.yaml"),
        CHECK,
        ("cannot read run.yaml: No such",),
    ),
    _override("text as number", "train.steps=many", "override `train.steps=many`", "whole number"),
    _override("NaN", "optimizer.lr=.nan", "`optimizer.lr` is NaN; it must be a number above 0"),
    _override("infinity", "optimizer.lr=.inf", "`optimizer.lr` is Infinity"),
    _override("negative", "train.micro_batch=-1", "`train.micro_batch` is -1", "at least 1"),
    _override("beyond 64 bits", f"train.steps={10**30}", "cannot use the value '1000000"),
    _override("huge model", "model.d_model=1e18", "more than 2^44", "`model.d_model` smaller"),
    _override("endless layers", "model={num_layers: 1e9, num_distinct_layers: null}", "most 10000"),
    _override("section as value", "train=3", "`train` is 3; it must be a section"),
    _override("value as section", "train.steps.a=3", "`train.steps` is a single value"),
    _override("key of 1000 parts", ".".join(["a"] * 1000) + "=1", "no key has 1000 parts"),
    _override("skipping unseen", "data.on_damage=skip", "`data.verify`", "set it to checksums"),
    BadInput(
        "huge model in a plan",
        file("run.yaml", BASE),
        command("plan", "run.yaml", "model.ffn.d_expert=1e18"),
        ("more than 2^44",),
    ),
]
