"""Without a compiler, Triton is not used: a note says so once, and training goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_dist.doctor import environment as doctor
from moa_dist.kernels import triton_support
from moa_dist.kernels.triton_support import compiler_problem, triton_problem
from moa_dist.train.startup import kernel_notes


@pytest.fixture
def machine(tmp_path):
    """A folder of programs and one of headers; a test fills them."""
    for name in ("bin", "include"):
        (tmp_path / name).mkdir()
    return tmp_path


def add_program(machine: Path, name: str) -> None:
    program = machine / "bin" / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def problem(machine: Path, **environment: str) -> str | None:
    return compiler_problem({"PATH": str(machine / "bin"), **environment}, machine / "include")


def test_what_is_missing_is_named(machine):
    assert "C compiler (gcc or clang)" in problem(machine)
    add_program(machine, "gcc")
    assert "Python.h" in problem(machine)
    (machine / "include" / "Python.h").touch()
    assert problem(machine) is None


@pytest.mark.parametrize("name", ["gcc", "clang", "my-cc"])
def test_cc_comes_before_gcc_and_clang(machine, name):
    (machine / "include" / "Python.h").touch()
    add_program(machine, name)
    assert (problem(machine) is None) == (name != "my-cc")
    assert problem(machine, CC=str(machine / "bin" / name)) is None
    assert "absent" in problem(machine, CC="absent")


def test_interpreted_kernels_need_no_compiler(machine):
    assert problem(machine, TRITON_INTERPRET="1") is None


@pytest.fixture
def without_compiler(machine, monkeypatch):
    """This process, with nothing in PATH."""
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(machine / "bin"))
    monkeypatch.setattr(triton_support, "find_spec", lambda name: name)
    triton_problem.cache_clear()
    yield
    triton_problem.cache_clear()


CHOOSE = """
import torch
from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.routed_experts import kernel_for
from moa_dist.kernels.row_map import ExpertWeights

torch.cuda.get_device_capability = lambda device: (8, 0)
hardware = Hardware.of(torch.device("cuda", 0))
experts = ExpertWeights(torch.zeros(2, 8, 8))
print(hardware.has_triton, kernel_for(experts, torch.zeros(4, 8), hardware).run.__name__)
"""


def test_a_gpu_uses_another_kernel(machine):
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_INTERPRET")}
    environment["PATH"] = str(machine / "bin")
    process = subprocess.run(
        [sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["False", "grouped_experts"]


@pytest.mark.usefixtures("without_compiler")
def test_a_run_on_a_gpu_says_so_once():
    (note,) = kernel_notes(torch.device("cuda", 0))
    assert "C compiler" in note
    assert not list(kernel_notes(torch.device("cpu")))


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(("gpu", "status"), [(True, "FAULT"), (False, "note")])
def test_doctor_reports_it(monkeypatch, gpu, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (finding,) = doctor.check_triton()
    assert (finding.check, finding.status) == ("triton", status)
    assert "gcc" in finding.remedy


def test_doctor_is_content_with_a_compiler(monkeypatch):
    triton_problem.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: name)
    assert [finding.status for finding in doctor.check_triton()] == ["ok"]
    triton_problem.cache_clear()
