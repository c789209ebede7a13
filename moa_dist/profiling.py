"""Names of the parts of a step, as they appear in a trace; nothing while none is recorded."""

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
"""What a step consists of. An inner part does not count for the outer one."""
PREFIX = "moa_dist/"
"""By which the labels are found among all names of a trace."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_OFF = nullcontext()


def annotate(name: StepPart) -> AbstractContextManager[Any]:
    """Label what is done while open."""
    # A compiled graph has no place for labels.
    if not torch.compiler.is_compiling() and torch.autograd._profiler_enabled():
        return record_function(PREFIX + name)
    return _OFF


def annotated(name: StepPart) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Label every call of a function."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def labelled(*args: _P.args, **keywords: _P.kwargs) -> _T:
            with annotate(name):
                return function(*args, **keywords)

        return labelled

    return decorate
