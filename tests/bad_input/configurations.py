"""Configurations that cannot be meant so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.bad_input.case import BadInput, Make, command, config_check, file
from tests.config.conftest import BASE

CHECK = config_check()
FILE = ("run.yaml",)


def _text(
    name: str,
    text: str | bytes,
    *says: str,
    keys: tuple[str, ...] = (),
    sources: tuple[str, ...] = FILE,
) -> BadInput:
    return BadInput(name, file("run.yaml", text), CHECK, says, keys, sources)


def _override(name: str, override: str, *says: str, keys: tuple[str, ...]) -> BadInput:
    check = config_check(override)
    return BadInput(name, file("run.yaml", BASE), check, says, keys, (f"override `{override}`",))


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


ABSENT = os.strerror(errno.ENOENT)

CONFIGURATIONS = [
    _text(
        "unknown key",
        BASE + "lerning_rate: 1\n",
        keys=("lerning_rate",),
        sources=("run.yaml:25",),
    ),
    _text(
        "key that stands twice",
        BASE + "name: x\n",
        keys=("name",),
        sources=("run.yaml:1", "run.yaml:25"),
    ),
    _text("tabs", "name: x\n\ttrain: 1\n", sources=("run.yaml:2",)),
    _text("cut in the middle", BASE[:-20] + "[", sources=("run.yaml:23",)),
    _text("empty file", "", keys=("name",), sources=()),
    _text("binary file", bytes(range(256)), "UTF-8"),
    _text("UTF-16", BASE.encode("utf-16"), "UTF-8"),
    _text("Latin-1", "name: café".encode("latin-1"), "UTF-8"),
    _text("NUL characters", "name: a\0b\n", "#x0000"),
    _text("a list", "- name\n"),
    _text("two documents", BASE + "---\n" + BASE, sources=("run.yaml:25",)),
    _text("aliases that multiply", _alias_bomb(), "10000", sources=("run.yaml:1",)),
    _text("alias of itself", "a: &a [*a]\n", "alias", sources=("run.yaml:1",)),
    _text("nested too deeply", "[" * 9999),
    _text("circle of extends", "extends: run.yaml\n", "run.yaml -> run.yaml"),
    _text("extends nothing", "extends: no.yaml\n", ABSENT, "run.yaml", sources=("no.yaml",)),
    _text(
        "code in a tag",
        "a: !!python/object/apply:os.mkdir [x]\n",
        "python/object/apply:os.mkdir",
        sources=("run.yaml:1",),
    ),
    _text("path as a name", BASE.replace("base", "../x"), keys=("name",), sources=("run.yaml:1",)),
    BadInput("extends without end", _chain(150, 1), CHECK, ("100 files",), (), ("98.yaml",)),
    BadInput("extends that multiply", _chain(40, 2), CHECK, ("100 files",), (), ("35.yaml",)),
    BadInput(
        "folder as configuration",
        lambda folder: (folder / "run.yaml").mkdir(),
        CHECK,
        (os.strerror(errno.EISDIR),),
        (),
        FILE,
    ),
    BadInput("no configuration", lambda folder: None, CHECK, (ABSENT,), (), FILE),
    BadInput(
        "dangling link",
        lambda folder: os.symlink("gone", folder / "run.yaml"),
        CHECK,
        (ABSENT,),
        (),
        FILE,
    ),
    _override("text as number", "train.steps=many", '"many"', keys=("train.steps",)),
    _override("NaN", "optimizer.lr=.nan", "NaN", keys=("optimizer.lr",)),
    _override("infinity", "optimizer.lr=.inf", "Infinity", keys=("optimizer.lr",)),
    _override("negative", "train.micro_batch=-1", "at least 1", keys=("train.micro_batch",)),
    _override("beyond 64 bits", f"train.steps={10**30}", "'1000000", keys=()),
    BadInput(
        "huge model",
        file("run.yaml", BASE),
        config_check("model.d_model=1e18"),
        ("2^44",),
        ("model.attention", "model.d_model"),
        ("run.yaml:7", "override `model.d_model=1e18`"),
    ),
    _override(
        "endless layers",
        "model={num_layers: 1e9, num_distinct_layers: null}",
        "10000",
        keys=("model.num_layers",),
    ),
    _override("section as value", "train=3", "a section", keys=("train",)),
    _override("value as section", "train.steps.a=3", keys=("train.steps",)),
    _override("key of 1000 parts", ".".join(["a"] * 1000) + "=1", "1000", keys=()),
    _override("skipping unseen", "data.on_damage=skip", keys=("data.on_damage", "data.verify")),
    BadInput(
        "huge model in a plan",
        file("run.yaml", BASE),
        command("plan", "run.yaml", "model.ffn.d_expert=1e18"),
        ("2^44", "model.ffn"),
    ),
]
