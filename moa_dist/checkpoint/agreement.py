"""Lets ranks agree about files: rank 0 looks for all, or each rank reports what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moa_dist.checkpoint.write import describe_write_error
from moa_dist.errors import DataError

Result = TypeVar("Result")


def gather(value: Result) -> list[Result]:
    """Return every rank's value, in rank order, on all ranks. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 and return its result on all ranks. Collective.

    Rank 0 alone looks at names in the folder, which other nodes may see later. If it meets an
    OSError, all ranks raise DataError.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except OSError as error:
            answer[1] = describe_write_error(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise DataError(answer[1])
    result: Result = answer[0]
    return result
