"""The sections of `moa-dist bench`: a new one is a function and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from moa_dist.bench.measure import Table
from moa_dist.bench.setting import Setting

Section = Callable[[Setting], list[Table]]

SECTIONS = {
    "layers": ("moa_dist.bench.layers", "attention and FFN with experts, part by part"),
    "block": ("moa_dist.bench.layers", "a whole block"),
    "step": ("moa_dist.bench.step", "a training step of the whole model"),
    "data": ("moa_dist.bench.data", "reading, against what training takes"),
    "jetmoe": ("moa_dist.bench.jetmoe", "a whole JetMoE, where the model is one, and theirs"),
    "peers": ("moa_dist.bench.peers", "MoE layers of other packages that are installed"),
}
"""Name -> module with a `Section` of that name, and its line in the help."""


def load_section(name: str) -> Section:
    """Import a section only when it is asked for: some load large packages."""
    module, _ = SECTIONS[name]
    return cast(Section, getattr(importlib.import_module(module), name))
