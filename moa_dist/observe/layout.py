"""Layout of TensorBoard's custom scalars: one chart per question, for any number of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, list[str | list[str]]]]
"""Category -> chart -> ["Multiline", [patterns of tags]], as `SummaryWriter` expects it."""

_CHARTS = {
    "Learning": {
        "loss": "loss/train|loss/validation",
        "bits per byte of held-out text": "loss/validation_bits_per_byte",
        "gradient norm": "optimizer/grad_norm",
        "learning rate": "optimizer/lr",
        "gradient norm by part": "optimizer/grad_norm_of_part/.*",
        "norm of the update over that of the weights, by part": "optimizer/update_ratio/.*",
        "auxiliary losses": "loss/train_aux/.*",
    },
    "Data": {
        "share of each source": "data/[^/]*/share",
        "epochs of each source": "data/[^/]*/epochs",
    },
    "Speed": {
        "tokens per second, all ranks": "speed/tokens_per_second",
        "model FLOPs utilization, or FLOPs per second": "speed/.*flops.*",
        "share of time spent waiting in collectives": "time/communication_share",
        "seconds of work per step, slowest and fastest rank": "time/work_seconds_of_.*",
        "which rank is slowest": "time/slowest_rank",
        "traffic by purpose, MiB": "traffic/purpose/.*",
    },
    "GPU of rank 0": {
        "memory, GiB": "rank0_gpu/memory_.*",
        "power, W": "rank0_gpu/power_watts",
        "temperature, °C": "rank0_gpu/temperature_celsius",
        "utilization, %": "rank0_gpu/utilization_percent",
    },
}
_MEASURES = {
    "drop share": "drop_share",
    "entropy, nats per token": "entropy",
    "fullest expert over mean": "load_imbalance",
    "dead experts": "dead_experts",
}


def layout(tags: Iterable[str]) -> Layout:
    """Return the charts that show at least one of these tags."""
    known = list(tags)
    charts = dict(_CHARTS)
    found = (re.fullmatch(r"routing_layer\d+/(.*)/drop_share/repeat\d+", tag) for tag in known)
    for router in sorted({match[1] for match in found if match}):
        charts[f"Router {router}, by layer and repeat"] = {
            title: rf"routing_layer\d+/{re.escape(router)}/{measure}/repeat\d+"
            for title, measure in _MEASURES.items()
        }
    filled: Layout = {}
    for category, of_category in charts.items():
        for title, pattern in of_category.items():
            # TensorBoard shows every tag that contains a match.
            if any(re.search(pattern, tag) for tag in known):
                filled.setdefault(category, {})[title] = ["Multiline", [f"^({pattern})$"]]
    return filled
