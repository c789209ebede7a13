"""Copies a rank's state to host memory, which is the only part of saving that blocks training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.checkpoint.state_source import Fragment
from moa_dist.checkpoint.tensor_file import TensorSpec


class BufferSlice(NamedTuple):
    """Locates a fragment in the global tensor and in the file."""

    name: str
    """`parameter/state`."""
    start: int
    """Offset of its first element in the flattened global tensor."""
    spec: TensorSpec
    """Its name, type and shape in the file."""


@dataclass(frozen=True)
class Snapshot:
    """Holds a copy of fragments, laid out as in the file."""

    places: list[BufferSlice]
    values: Tensor
    """Bytes of all fragments, concatenated; uint8 on the CPU."""


class HostCopy:
    """Holds host memory for one snapshot, reused between saves because allocation is slow.

    Its size is that of the parameters and moments that this rank owns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, fragments: Iterable[Fragment]) -> Snapshot:
        """Copy the fragments, overwriting the previous snapshot."""
        # Wide types come first, so that all are aligned.
        ordered = sorted(fragments, key=lambda f: -f.view.itemsize)
        num_bytes = sum(f.view.nbytes for f in ordered)
        if self._buffer.numel() < num_bytes:
            pinned = self._device.type == "cuda"  # for asynchronous copies at full speed
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
