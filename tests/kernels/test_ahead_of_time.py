"""What is launched for shipped configurations compiles for each GPU, and fits it.

`python -m tests.kernels.ahead_of_time` prints the table.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moa_dist
from tests.config.test_shipped_configs import NAMES

PACKAGE = Path(moa_dist.__file__).parent
LIMITS = {80: (192, 163), 90: (128, 227), 100: (128, 227)}
"""Most registers per thread, so that two programs of 8 warps fit a multiprocessor, or one on the
oldest; KiB of shared memory that a program may use."""
MOST_REGISTERS = 192
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ATOMICS = ("RED.", "ATOM.", "ATOMG.")
SAMPLE = ["--config", "masked_lm/8k16e256d", "--kernel", "_choose_backward", "_product"]
MODELS = [
    "--config",
    *("moeut/244m", "moa/8k16e256d", "jetmoe/8b", "switchhead/big", "family/ds_moe"),
]
"""A quarter of what all shipped configurations launch, which the command compiles in half an hour
per GPU."""
UNALIGNED = ["--config", "moeut/44m", "family/bam", "--kernel", "_outer_products"]
"""Rows of 412 numbers, of which a load takes four, and rows in fp32, without tensor cores."""
PRODUCTS = {"_product", "_hidden_products", "_hidden_gradients", "_outer_products"}


def compiled(gpu, *arguments):
    """Compile in a process of its own, since tests of this one interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", "--gpu", str(gpu), "--json"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(
    scope="module",
    params=[
        "sample",
        *(pytest.param(gpu, marks=pytest.mark.full) for gpu in ("unaligned", *LIMITS)),
    ],
)
def kernels(request):
    """Some kernels of one configuration for sm_90; with --full, more, and all of five models."""
    if request.param == "sample":
        return 90, compiled(90, *SAMPLE)
    if request.param == "unaligned":
        return 80, compiled(80, *UNALIGNED)
    return request.param, compiled(request.param, *MODELS)


def test_registers_and_shared_memory_fit(kernels):
    gpu, found = kernels
    registers, kib = LIMITS[gpu]
    assert found
    too_large = [
        k
        for k in found
        # Threads of programs of fewer than 8 warps may have more: as many still fit.
        if k["registers"] > min(registers * max(1, 8 / k["warps"]), MOST_REGISTERS)
        or k["stack"]
        or k["shared"] > kib * 1024
    ]
    assert not too_large


def test_products_run_on_tensor_cores_and_load_asynchronously(kernels):
    gpu, found = kernels
    products = [k for k in found if k["tile"] is not None]
    assert products
    for kernel in products:
        names = kernel["instructions"]
        # fp32 keeps its precision, which tensor cores would round away.
        assert any(name.startswith(TENSOR_CORES[gpu]) for name in names) == (
            kernel["type"] == "bf16"
        ), kernel
        if kernel["type"] == "bf16":
            loads = [name for name in names if name.startswith("LDGSTS")]
            assert loads, kernel
            if all(width % 8 == 0 for width in kernel["widths"]):
                assert any(name.endswith(".128") for name in loads), kernel


def test_tiles_do_enough_work_per_byte(kernels):
    """Where experts have the rows, and matrices the widths, for a tile of 128 x 128."""
    gpu, found = kernels
    wide = [
        k
        for k in found
        if k["kernel"] in PRODUCTS
        and k["type"] == "bf16"
        and k["tile"][0] == 128
        and all(width >= 128 and width % 4 == 0 for width in k["widths"])
        # Gates and second pairs take registers from the result; on sm_80 a second pair does.
        and (k["num_epilogue_operands"] == 1 or (k["kernel"] == "_product" and gpu > 80))
    ]
    assert wide
    assert all(kernel["flop_per_byte"] >= 64 for kernel in wide)


def test_nothing_is_added_to_memory_atomically(kernels):
    _, found = kernels
    for kernel in found:
        for name in kernel["instructions"]:
            assert not f"{name}.".startswith(ATOMICS), kernel


@pytest.mark.full
def test_every_kernel_of_the_package_is_in_the_table():
    """All are in modules that define them by `triton.jit` and begin with an underscore."""
    names = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"^@triton\.jit.*\ndef (_\w+)\(", path.read_text(), re.MULTILINE)
    }
    arguments = ("--config", "examples/moeut_44m", "jetmoe/8b")
    assert names == {kernel["kernel"] for kernel in compiled(90, *arguments)}


@pytest.mark.full
def test_every_relative_runs_on_the_fake_gpu():
    """Also those whose batches have tasks, or whose host waits for a number of tokens."""
    relatives = [name for name in NAMES if name.startswith("family/")]
    assert compiled(90, "--kernel", "_map_tiles", "--config", *relatives)
