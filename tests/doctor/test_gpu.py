"""A GPU's health is a fault, a note or ok; a missing NVML is reported once and is no fault."""

import re
from types import SimpleNamespace

import pynvml
import pytest
import torch

from moa_dist.doctor.gpu import check_gpus, driver_version

DEVICE = torch.device("cuda", 0)


def raising(error):
    def call(*_args):
        raise error

    return call


@pytest.fixture
def gpu(monkeypatch):
    """Readings of one healthy device, which a test may change."""
    state = SimpleNamespace(
        celsius=60, cap=700_000, errors={0: 3, 1: 0}, rows=(0, 0, 0, 0), reasons=0, closed=0
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a")
    )

    def close():
        state.closed += 1

    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": close,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda h: "NVIDIA H100",
        "nvmlDeviceGetTemperature": lambda h, sensor: state.celsius,
        "nvmlDeviceGetTemperatureThreshold": lambda h, kind: 90,
        "nvmlDeviceGetEnforcedPowerLimit": lambda h: state.cap,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda h: 700_000,
        "nvmlDeviceGetTotalEccErrors": lambda h, kind, counter: state.errors[kind],
        "nvmlDeviceGetRemappedRows": lambda h: state.rows,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda h: state.reasons,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    return state


def statuses():
    return {f.check: f.status for f in check_gpus([DEVICE]) if f.status != "ok"}


def test_a_healthy_gpu_has_no_fault(gpu):
    findings = list(check_gpus([DEVICE]))
    assert {f.status for f in findings} == {"ok"}
    assert {f.subject for f in findings} == {"cuda:0 NVIDIA H100"}
    assert all(f.text.startswith(f"{f.subject}: ") for f in findings)
    (errors,) = (f for f in findings if f.check == "gpu memory errors")
    counts = re.findall(r"(\d+) (\w+)", errors.text.partition(": ")[2])
    assert counts == [("0", "uncorrected"), ("3", "corrected")]
    assert gpu.closed == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"celsius": 88}, {"gpu temperature": "FAULT"}),
        ({"cap": 500_000}, {"gpu power": "note"}),
        ({"errors": {0: 0, 1: 1}}, {"gpu memory errors": "FAULT"}),
        ({"rows": (1, 0, 1, 0)}, {"gpu memory rows": "note"}),
        ({"rows": (1, 0, 1, 1)}, {"gpu memory rows": "FAULT"}),
        ({"reasons": pynvml.nvmlClocksEventReasonHwThermalSlowdown}, {"gpu clocks": "FAULT"}),
        ({"reasons": pynvml.nvmlClocksEventReasonHwSlowdown}, {"gpu clocks": "FAULT"}),
        ({"reasons": pynvml.nvmlClocksEventReasonSwPowerCap}, {"gpu clocks": "note"}),
        ({"reasons": pynvml.nvmlClocksEventReasonGpuIdle}, {}),
    ],
)
def test_what_is_wrong_is_named(gpu, change, found):
    vars(gpu).update(change)
    assert statuses() == found


def test_what_a_device_lacks_is_left_out_and_what_fails_is_a_finding(gpu, monkeypatch):
    no_ecc, lost = pynvml.NVMLError_NotSupported(), pynvml.NVMLError_GpuIsLost()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEccErrors", raising(no_ecc))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", raising(lost))
    findings = list(check_gpus([DEVICE]))
    assert not any(f.check == "gpu memory errors" for f in findings)
    assert [f.check for f in findings if f.is_fault] == ["gpu temperature"]
    assert any(f.check == "gpu clocks" for f in findings)


def test_missing_nvml_is_one_note(monkeypatch):
    error = pynvml.NVMLError_LibraryNotFound()
    monkeypatch.setattr(pynvml, "nvmlInit", raising(error))
    (finding,) = check_gpus([DEVICE, torch.device("cuda", 1)])
    assert finding.status == "note"
    assert driver_version() == "none"
