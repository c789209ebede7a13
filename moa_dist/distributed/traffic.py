"""What this rank sends to others, counted where it is sent.

Counted are bytes that leave the rank, in the algorithms that move fewest: what an all-to-all keeps
at home is not counted, a gather or scatter over P ranks moves P - 1 shards, and an all-reduce
twice the share (P - 1) / P of its data. `moa_dist.plan.predicted_traffic` predicts the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Purpose = Literal["plan", "dispatch", "combine", "gather", "reduce"]
"""Why a collective runs: exchanging a plan (counts, indices, router weights and their
gradients), rows on their way to experts, rows on their way back, weights of experts, gradients.
Gradients of rows and weights count with the trip whose way they take back."""


class TrafficKey(NamedTuple):
    """One kind of traffic."""

    layer: str
    """Module that it serves, such as `stack.layers.0.ffn`."""
    purpose: Purpose
    """Why it is sent."""
    backward: bool
    """Sent by the backward pass."""


class TrafficVolume(NamedTuple):
    """How much of it."""

    messages: int
    """Collectives entered."""
    num_bytes: int
    """Sent to other ranks by this one."""

    def plus(self, other: TrafficVolume) -> TrafficVolume:
        """Both together."""
        return TrafficVolume(self.messages + other.messages, self.num_bytes + other.num_bytes)


NO_TRAFFIC = TrafficVolume(0, 0)
"""Nothing sent."""

Traffic = Mapping[TrafficKey, TrafficVolume]
"""All flows of a step."""


class TrafficCounter:
    """Adds up flows until they are taken, once per step."""

    def __init__(self) -> None:
        self._volumes: dict[TrafficKey, TrafficVolume] = {}

    def add(self, key: TrafficKey, num_bytes: int) -> None:
        """Count one collective."""
        self._volumes[key] = self._volumes.get(key, NO_TRAFFIC).plus(TrafficVolume(1, num_bytes))

    def take(self) -> dict[TrafficKey, TrafficVolume]:
        """Everything added since the last call."""
        taken, self._volumes = self._volumes, {}
        return taken
