"""What ranks sent each other, as names and sums."""

from __future__ import annotations

from collections import defaultdict

from moa_dist.distributed.traffic import Flow, Traffic


def flow_name(flow: Flow) -> str:
    """Such as `stack.layers.0.ffn/dispatch` and, of the backward pass, `.../dispatch.backward`."""
    return f"{flow.layer}/{flow.purpose}{'.backward' if flow.backward else ''}"


def layer_and_purpose(name: str) -> tuple[str, str]:
    """What `flow_name` says of a flow, both directions alike."""
    layer, _, purpose = name.removesuffix(".backward").rpartition("/")
    return layer, purpose


def traffic_summary(traffic: Traffic) -> dict[str, float]:
    """MiB by layer and by purpose, and the number of messages; all ranks together."""
    mib: dict[str, float] = defaultdict(float)
    for flow, volume in traffic.items():
        for name in (f"layer/{flow.layer}", f"purpose/{flow.purpose}"):
            mib[f"{name}_mib"] += volume.num_bytes / 2**20
    return {**mib, "messages": float(sum(volume.messages for volume in traffic.values()))}
