"""Names and sums of the traffic between ranks."""

from __future__ import annotations

from collections import defaultdict

from moa_dist.distributed.traffic import Traffic, TrafficKey


def traffic_name(key: TrafficKey) -> str:
    """Name a kind of traffic, such as `stack.layers.0.ffn/dispatch` or `.../dispatch.backward`."""
    return f"{key.layer}/{key.purpose}{'.backward' if key.backward else ''}"


def layer_and_purpose(name: str) -> tuple[str, str]:
    """Parse a name made by `traffic_name`, ignoring the direction."""
    layer, _, purpose = name.removesuffix(".backward").rpartition("/")
    return layer, purpose


def traffic_summary(traffic: Traffic) -> dict[str, float]:
    """Sum the traffic of all ranks: MiB by layer and by purpose, and the number of messages."""
    mib: dict[str, float] = defaultdict(float)
    for key, volume in traffic.items():
        for name in (f"layer/{key.layer}", f"purpose/{key.purpose}"):
            mib[f"{name}_mib"] += volume.num_bytes / 2**20
    return {**mib, "messages": float(sum(volume.messages for volume in traffic.values()))}
