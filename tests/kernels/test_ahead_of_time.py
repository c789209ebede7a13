"""What is launched for shipped configurations compiles for each GPU, and fits it."""

import json
import os
import subprocess
import sys

import pytest

CONFIGS = ["moeut/244m.yaml", "moeut/44m.yaml", "moa/8k16e256d.yaml", "jetmoe/8b.yaml"]
ARCHITECTURES = {80: (192, 163), 90: (128, 227), 100: (128, 227)}
"""Most registers per thread, so that two programs fit a multiprocessor, or one on the oldest; KiB
of shared memory that a program may use."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda number: f"sm_{number}")
def kernels(request):
    """In a process of its own, since tests of this one interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", str(request.param), *CONFIGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return request.param, json.loads(done.stdout)


@pytest.mark.full
def test_registers_and_shared_memory_fit(kernels):
    architecture, found = kernels
    registers, kib = ARCHITECTURES[architecture]
    too_large = [
        k for k in found if k["registers"] > registers or k["stack"] or k["shared"] > kib * 1024
    ]
    assert not too_large


@pytest.mark.full
def test_products_run_on_tensor_cores_and_load_asynchronously(kernels):
    architecture, found = kernels
    products = [k for k in found if k["tile"] is not None]
    assert {k["kernel"] for k in products} == {
        "_product", "_hidden_products", "_hidden_gradients", "_outer_products"
    }  # fmt: skip
    for kernel in products:
        instructions = kernel["instructions"]
        assert any(name.startswith(TENSOR_CORES[architecture]) for name in instructions), kernel
        loads = [name for name in instructions if name.startswith("LDGSTS")]
        assert loads, kernel
        if all(width % 8 == 0 for width in kernel["widths"]):
            assert any(name.endswith(".128") for name in loads), kernel


@pytest.mark.full
def test_tiles_of_moeut_244m_do_enough_work_per_byte(kernels):
    """Gated experts and widths that are no multiple of 8 bytes have smaller tiles."""
    _, found = kernels
    of_model = [k for k in found if k["tile"] is not None and set(k["widths"]) == {128, 1024}]
    assert len(of_model) >= 6
    assert all(kernel["flop_per_byte"] >= 64 for kernel in of_model)


@pytest.mark.full
def test_nothing_is_added_to_memory_atomically(kernels):
    _, found = kernels
    for kernel in found:
        for name in kernel["instructions"]:
            assert not f"{name}.".startswith(("RED.", "ATOM.", "ATOMG.")), kernel
