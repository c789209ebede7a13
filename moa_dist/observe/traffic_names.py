"""What ranks sent each other, as names and sums."""

from __future__ import annotations

from collections import defaultdict

from moa_dist.distributed.traffic import Traffic, TrafficKey


def traffic_name(key: TrafficKey) -> str:
    """Such as `stack.layers.0.ffn/dispatch` and, of the backward pass, `.../dispatch.backward`."""
    return f"{key.layer}/{key.purpose}{'.backward' if key.backward else ''}"


def layer_and_purpose(name: str) -> tuple[str, str]:
    """What `traffic_name` says of a flow, both directions alike."""
    layer, _, purpose = name.removesuffix(".backward").rpartition("/")
    return layer, purpose


def traffic_summary(traffic: Traffic) -> dict[str, float]:
    """MiB by layer and by purpose, and the number of messages; all ranks together."""
    mib: dict[str, float] = defaultdict(float)
    for key, volume in traffic.items():
        for name in (f"layer/{key.layer}", f"purpose/{key.purpose}"):
            mib[f"{name}_mib"] += volume.num_bytes / 2**20
    return {**mib, "messages": float(sum(volume.messages for volume in traffic.values()))}
