"""A copy of a rank's state in host memory: all that training waits for when it saves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moa_dist.checkpoint.tensor_file import TensorSpec

if TYPE_CHECKING:  # readers of checkpoints need no DeepSpeed
    from moa_dist.train.fragments import Fragment


class BufferSlice(NamedTuple):
    """Where a fragment belongs."""

    name: str
    """`parameter/state`."""
    start: int
    """First element, in the flattened global tensor."""
    spec: TensorSpec
    """What it is called in the file."""


@dataclass(frozen=True)
class Snapshot:
    """Fragments as they were, laid out as they will lie in a file."""

    places: list[BufferSlice]
    values: Tensor
    """The bytes of all, one after the other; uint8 on the CPU."""


class HostCopy:
    """Host memory for one snapshot at a time, kept between saves: allocating is slow.

    It costs as many bytes as this rank owns of parameters and moments.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, fragments: Iterable[Fragment]) -> Snapshot:
        """Copy them. Overwrites the snapshot taken before."""
        # Wide types first keep every one aligned.
        ordered = sorted(fragments, key=lambda f: -f.view.itemsize)
        num_bytes = sum(f.view.nbytes for f in ordered)
        if self._buffer.numel() < num_bytes:
            pinned = self._device.type == "cuda"  # copied at full speed, all at once
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        offset, places = 0, []
        for fragment in ordered:
            view = fragment.view.detach()
            copy = self._buffer[offset : offset + view.nbytes].view(view.dtype)
            copy.copy_(view, non_blocking=True)
            offset += view.nbytes
            name = f"{fragment.parameter}/{fragment.state}"
            spec = TensorSpec(f"{name}/{fragment.start}", view.dtype, tuple(view.shape))
            places.append(BufferSlice(name, fragment.start, spec))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return Snapshot(places, self._buffer[:num_bytes])
