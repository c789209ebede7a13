"""Reads telemetry of this rank's GPU through NVML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml
import torch

_GIB = 2**30


class GpuTelemetry:
    """Reads one device's telemetry; reads nothing on a CPU or where NVML is not available."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self.reason: str | None = None
        """Why nothing is read; None if telemetry is available."""
        if device.type != "cuda":
            self.reason = f"no GPU telemetry: this rank computes on the {device.type.upper()}"
            return
        try:
            pynvml.nvmlInit()
            self._handle = device_handle(device)
        except pynvml.NVMLError as error:
            self.reason = f"no GPU telemetry: {error}; training continues"

    def read(self) -> dict[str, float]:
        """Return readings by name (with the unit); those that the device lacks are left out."""
        if self._handle is None:
            return {}
        values: dict[str, float] = {}
        for read in _READERS:
            # One by one: a MIG slice has no utilization of its own, some cards have no power
            # sensor, and a card that has fallen off the bus makes training fail by itself.
            try:
                values |= read(self._handle)
            except pynvml.NVMLError:
                continue
        return values

    def close(self) -> None:
        """Shut NVML down."""
        if self._handle is not None:
            pynvml.nvmlShutdown()
            self._handle = None


def device_handle(device: torch.device) -> Any:
    """Return NVML's handle of a torch device, found by UUID.

    The indices do not match: torch counts the devices in CUDA_VISIBLE_DEVICES, in that order or
    fastest first, while NVML counts all devices of the machine by PCI bus.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _memory(handle: Any) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_gib": memory.used / _GIB, "memory_total_gib": memory.total / _GIB}


def _utilization(handle: Any) -> dict[str, float]:
    return {"utilization_percent": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)}


def _temperature(handle: Any) -> dict[str, float]:
    celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"temperature_celsius": float(celsius)}


def _power(handle: Any) -> dict[str, float]:
    return {"power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000}


_READERS: tuple[Callable[[Any], dict[str, float]], ...] = (
    _memory,
    _utilization,
    _temperature,
    _power,
)
