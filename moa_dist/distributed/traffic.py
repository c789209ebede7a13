"""Counts what this rank sends to others.

The count is of bytes that leave the rank, assuming bandwidth-optimal algorithms: the part of an
all-to-all that stays on the rank is not counted, a gather or scatter over P ranks moves P - 1
shards, and an all-reduce moves 2 (P - 1) / P times its data. `moa_dist.plan.predicted_traffic`
predicts the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Purpose = Literal["plan", "dispatch", "combine", "gather", "reduce"]
"""Why a collective runs: to exchange a dispatch plan (counts, indices, router weights and their
gradients), to send rows to experts, to return rows, to gather expert weights, to reduce gradients.
Gradients of rows and weights count under the purpose of the forward transfer they reverse."""


class TrafficKey(NamedTuple):
    """Identifies one kind of traffic."""

    layer: str
    """Module that communicates, such as `stack.layers.0.ffn`."""
    purpose: Purpose
    """Why the data is sent."""
    backward: bool
    """Whether the backward pass sends it."""


class TrafficVolume(NamedTuple):
    """An amount of traffic."""

    messages: int
    """Number of collectives entered."""
    num_bytes: int
    """Bytes sent from this rank to others."""

    def plus(self, other: TrafficVolume) -> TrafficVolume:
        """Return the sum of both volumes."""
        return TrafficVolume(self.messages + other.messages, self.num_bytes + other.num_bytes)


NO_TRAFFIC = TrafficVolume(0, 0)
"""The volume of no traffic at all."""

Traffic = Mapping[TrafficKey, TrafficVolume]
"""All traffic of a step."""


class TrafficCounter:
    """Accumulates the traffic of a step."""

    def __init__(self) -> None:
        self._volumes: dict[TrafficKey, TrafficVolume] = {}

    def add(self, key: TrafficKey, num_bytes: int) -> None:
        """Record one collective."""
        self._volumes[key] = self._volumes.get(key, NO_TRAFFIC).plus(TrafficVolume(1, num_bytes))

    def take(self) -> dict[TrafficKey, TrafficVolume]:
        """Return everything recorded since the last call, and start over."""
        taken, self._volumes = self._volumes, {}
        return taken
