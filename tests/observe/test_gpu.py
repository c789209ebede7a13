"""Telemetry reads the right GPU, and a run continues without it."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from moa_dist.observe.gpu import GpuTelemetry


def raising(error):
    def call(*_args):
        raise error

    return call


def test_a_cpu_has_no_readings():
    gpu = GpuTelemetry(torch.device("cpu"))
    assert gpu.reason
    assert "CPU" in gpu.reason
    assert gpu.read() == {}
    gpu.close()


def test_without_a_driver_the_reason_is_given(monkeypatch):
    error = pynvml.NVMLError_LibraryNotFound()
    monkeypatch.setattr(pynvml, "nvmlInit", raising(error))
    gpu = GpuTelemetry(torch.device("cuda", 0))
    assert gpu.reason is not None
    assert str(error) in gpu.reason
    assert gpu.read() == {}
    gpu.close()


@pytest.fixture
def two_gpus(monkeypatch):
    """GPU `b` is CUDA's device 0 but number 1 of the machine; returns the calls of shutdown."""
    closed = []
    uuids = {"GPU-a": 0, "GPU-b": 1, "MIG-c": 2}

    def by_uuid(uuid):
        if uuid not in uuids:
            raise pynvml.NVMLError_NotFound()
        return uuids[uuid]

    visible = ["b", "a", "c"]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=visible[device.index]),
    )
    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: closed.append(True),
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(
            used=(h + 1) * 2**30, total=80 * 2**30
        ),
        "nvmlDeviceGetUtilizationRates": lambda h: SimpleNamespace(gpu=97),
        "nvmlDeviceGetTemperature": lambda h, sensor: 61,
        "nvmlDeviceGetPowerUsage": lambda h: 350_500,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    return closed


@pytest.mark.parametrize(("index", "used"), [(0, 2.0), (1, 1.0), (2, 3.0)])
def test_the_device_is_found_by_uuid_not_by_index(two_gpus, index, used):
    gpu = GpuTelemetry(torch.device("cuda", index))
    assert gpu.reason is None
    assert gpu.read() == {
        "memory_used_gib": used,
        "memory_total_gib": 80.0,
        "utilization_percent": 97.0,
        "temperature_celsius": 61.0,
        "power_watts": 350.5,
    }
    gpu.close()
    gpu.close()
    assert two_gpus == [True]
    assert gpu.read() == {}


def test_what_a_device_lacks_is_left_out(two_gpus, monkeypatch):
    error = pynvml.NVMLError_NotSupported()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", raising(error))
    readings = GpuTelemetry(torch.device("cuda", 0)).read()
    assert "utilization_percent" not in readings
    assert readings["power_watts"] == 350.5
