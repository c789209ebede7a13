"""Memory that tensors on a CPU free is kept, seen by the pages that later ones fault in."""

import json
import platform
import subprocess
import sys

import pytest

_COUNT_FAULTS = """
import json, resource, sys
import torch
from moa_dist.distributed.device import keep_freed_memory

def count():
    for _ in range(16):  # glibc first puts small remainders aside, between tensors
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def after(device):
    keep_freed_memory(torch.device(device))
    return count()

print(json.dumps([count(), *map(after, sys.argv[1:])]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_tensors_take_the_place_of_freed_ones():
    """Counted in a process of its own, whose memory stays as it is set."""
    command = [sys.executable, "-c", _COUNT_FAULTS, "meta", "cpu", "cpu"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, of_another_device, once, twice = json.loads(done.stdout)
    assert of_another_device > before / 2
    assert once < before / 10
    assert twice < before / 10
