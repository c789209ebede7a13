"""Prints what shipped configurations cost: `python -m tests.fake_cuda [CONFIG ...]`."""

import sys

from moa_dist.models.language_model import LanguageModel
from tests.fake_cuda.budgets import BUDGETS
from tests.fake_cuda.estimates import ASSUMED, GPU, floor_of, of_experts, part_bytes
from tests.fake_cuda.launches import Launches
from tests.fake_cuda.training_step import bf16_model, measure

SEQUENCES, LENGTH = 8, 1024


def show(path: str) -> None:
    launches, saved = measure(path, SEQUENCES, LENGTH)
    print(
        f"{path}: {launches.num_kernels} kernels, "
        f"{launches.bytes_full / 1e9:.1f} GB full, {launches.bytes_distinct / 1e9:.1f} distinct, "
        f"{saved / 2**30:.2f} GiB saved, {launches.waits.total()} waits"
    )
    print("  by file:", dict(launches.by_place.most_common(14)))
    print("  by operation:", dict(launches.kernels.most_common(24)))
    show_estimate(bf16_model(path), launches)


def show_estimate(model: LanguageModel, launches: Launches) -> None:
    parts = part_bytes(model, SEQUENCES * LENGTH)
    total = sum(parts.values())
    print("  GB that each part must move:")
    for name, moved in parts.items():
        print(f"    {name:22} {moved / 1e9:7.2f}")
    ratio = launches.bytes_full / total
    print(f"    {'all':22} {total / 1e9:7.2f}; measured {ratio:.2f} times that")
    if not (needed := of_experts(parts)):
        return
    ratio = of_experts(launches.bytes_by_place) / needed
    floor = floor_of(model, SEQUENCES * LENGTH)
    print(
        f"    experts' kernels move {ratio:.2f} times their parts\n"
        f"    a routed layer on one {GPU.name} ({GPU.memory_bandwidth / 1e12:g} TB/s): floor "
        f"{max(floor) * 1e3:.3f} ms ({floor.flops * 1e3:.3f} for products, "
        f"{floor.bytes * 1e3:.3f} for bytes), expected {floor.expected(ratio) * 1e3:.3f} ms at "
        f"{ASSUMED.matmul_efficiency:.0%} of peak and {ASSUMED.memory_efficiency:.0%} of bandwidth"
    )


for path in sys.argv[1:] or BUDGETS:
    show(path)
