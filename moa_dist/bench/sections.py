"""The sections of `moa-dist bench`: a new one is a function and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from moa_dist.bench.measure import Table
from moa_dist.bench.setting import Setting
from moa_dist.distributed.mesh import Mesh

Section = Callable[[Setting], list[Table]]
SharedSection = Callable[[Setting, Mesh], list[Table]]

SECTIONS = {
    "layers": ("moa_dist.bench.layers", "attention and FFN with experts, part by part"),
    "block": ("moa_dist.bench.layers", "a whole block"),
    "step": ("moa_dist.bench.step", "a training step of the whole model"),
    "data": ("moa_dist.bench.data", "reading, against what training takes"),
    "jetmoe": ("moa_dist.bench.jetmoe", "a whole JetMoE, where the model is one, and theirs"),
    "peers": ("moa_dist.bench.peers", "MoE layers of other packages that are installed"),
}
"""Name -> module with a `Section` of that name, and its line in the help."""

SHARED_SECTIONS = {
    "exchange": ("moa_dist.bench.exchange", "layers and steps whose experts are spread over ranks"),
    "collectives": ("moa_dist.bench.collectives", "what the links between ranks carry"),
    "checkpoint": ("moa_dist.bench.checkpoint", "saving and loading in `output`, against a step"),
}
"""The same of those that several ranks measure together, as `SharedSection`s."""


WHEN_EMPTY = {
    "layers": "the model has no experts",
    "jetmoe": "the model is no JetMoE",
    "peers": "the model's FFN has no experts",
    "exchange": "the model has no experts, or there is one rank alone (--ranks)",
    "collectives": "there is one rank alone (--ranks)",
}
"""Why a section has no table, where that can be."""


def load_section(name: str) -> Section:
    """Import a section only when it is asked for: some load large packages."""
    return cast(Section, _load(SECTIONS, name))


def load_shared_section(name: str) -> SharedSection:
    """The same."""
    return cast(SharedSection, _load(SHARED_SECTIONS, name))


def _load(sections: dict[str, tuple[str, str]], name: str) -> Any:
    module, _ = sections[name]
    return getattr(importlib.import_module(module), name)
