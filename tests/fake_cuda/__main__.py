"""Prints what shipped configurations cost: `python -m tests.fake_cuda [CONFIG ...]`."""

import sys

from tests.fake_cuda.budgets import BUDGETS
from tests.fake_cuda.training_step import measure

for path in sys.argv[1:] or BUDGETS:
    launches, saved = measure(path)
    print(
        f"{path}: {launches.num_kernels} kernels, "
        f"{launches.bytes_full / 1e9:.1f} GB full, {launches.bytes_distinct / 1e9:.1f} distinct, "
        f"{saved / 2**30:.2f} GiB saved, {launches.waits.total()} waits"
    )
    print("  by file:", dict(launches.by_place.most_common(14)))
    print("  by operation:", dict(launches.kernels.most_common(24)))
