"""Labels for the parts of a training step in profiler traces; free while no trace is recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch.profiler import record_function

StepPart = Literal[
    "router",
    "dispatch",
    "exchange",
    "experts",
    "attention",
    "ffn",
    "loss",
    "backward",
    "optimizer",
    "other",
]
"""The parts of a step. Time in an inner part does not count toward the outer one."""
PREFIX = "moa_dist/"
"""Distinguishes these labels from all other names in a trace."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_OFF = nullcontext()


def annotate(name: StepPart) -> AbstractContextManager[Any]:
    """Return a context manager that labels the work done inside it."""
    # Labels would break the graph of torch.compile.
    if not torch.compiler.is_compiling() and torch.autograd._profiler_enabled():
        return record_function(PREFIX + name)
    return _OFF


def annotated(name: StepPart) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Return a decorator that labels every call of a function."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def labeled(*args: _P.args, **keywords: _P.kwargs) -> _T:
            with annotate(name):
                return function(*args, **keywords)

        return labeled

    return decorate
