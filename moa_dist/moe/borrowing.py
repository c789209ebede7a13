"""Modules that one module holds and others use as well.

A borrowed module stands in the model once, under the name that its holder gives it. So it has one
set of parameters, which is initialized, sharded, saved and updated once, and what is hooked to it
runs once per call. The borrower has it as an attribute, and computes as if it held it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn


def borrow(borrower: nn.Module, name: str, lent: nn.Module) -> None:
    """Let `borrower` use `lent` in place of its own child `name`."""
    delattr(borrower, name)
    # What is set in this way is no child: torch neither lists nor saves it.
    object.__setattr__(borrower, name, lent)


def borrowed(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of everything that `module` borrows."""
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            yield name, value


def named_used_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of `module`, its children and what it borrows, recursively."""
    yield name, module
    for child_name, child in chain(module.named_children(), borrowed(module)):
        yield from named_used_modules(child, f"{name}.{child_name}".lstrip("."))


def used_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules alone."""
    return (used for _, used in named_used_modules(module))
