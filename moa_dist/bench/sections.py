"""The sections of `moa-dist bench`; a new one takes a function and a line here."""

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
    "data": ("moa_dist.bench.data", "reading data, against what training takes"),
    "jetmoe": (
        "moa_dist.bench.jetmoe",
        "a whole JetMoE, if the model is one, against theirs",
    ),
    "peers": ("moa_dist.bench.peers", "MoE layers of other installed packages"),
}
"""Module, with a `Section` of that name, and help line of each section of one process."""

SHARED_SECTIONS = {
    "exchange": ("moa_dist.bench.exchange", "layers and steps with expert parallelism"),
    "collectives": ("moa_dist.bench.collectives", "bandwidth between ranks"),
    "checkpoint": ("moa_dist.bench.checkpoint", "saving and resuming in `output`, against a step"),
}
"""Module, with a `SharedSection` of that name, and help line of each section of several ranks."""


WHEN_EMPTY = {
    "layers": "the model has no experts",
    "jetmoe": "the model is not a JetMoE",
    "peers": "the model's FFN has no experts",
    "exchange": "the model has no experts, or only one rank runs (--ranks)",
    "collectives": "only one rank runs (--ranks)",
}
"""Reasons why a section may have no table."""


def load_section(name: str) -> Section:
    """Import a section on demand, because some load large packages."""
    return cast(Section, _load(SECTIONS, name))


def load_shared_section(name: str) -> SharedSection:
    """Import a section of several ranks on demand."""
    return cast(SharedSection, _load(SHARED_SECTIONS, name))


def _load(sections: dict[str, tuple[str, str]], name: str) -> Any:
    module, _ = sections[name]
    return getattr(importlib.import_module(module), name)
