"""Checks the health of GPUs through NVML: temperature, power, memory errors, clock throttling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pynvml
import torch

from moa_dist.distributed.gpus import unusable_gpus
from moa_dist.doctor.finding import Finding, failed
from moa_dist.observe.gpu import device_handle

_NEAR_LIMIT = 5
"""Degrees below the slowdown temperature from which a temperature is a fault."""
_THROTTLED_BY_FAULT = {
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "temperature (hardware)",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "temperature (driver)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply's brake signal",
}
_THROTTLED_BY_SETTING = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "the power limit",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "the application clock setting",
}


def check_gpus(devices: list[torch.device]) -> Iterator[Finding]:
    """Check each device, or that torch uses none because there is none.

    A missing NVML is reported once, and is not a fault.
    """
    if not devices and (unusable := unusable_gpus()) is not None:
        yield Finding("gpu", "FAULT", *unusable)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding("gpu", "note", f"GPU health cannot be read: {error}")
        return
    try:
        for device in devices:
            yield from _check_gpu(device)
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str:
    """Return the version of the NVIDIA driver; `none` if NVML is not available."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none"
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _check_gpu(device: torch.device) -> Iterator[Finding]:
    try:
        handle = device_handle(device)
        name = f"{device} {pynvml.nvmlDeviceGetName(handle)}"
    except pynvml.NVMLError as error:
        yield failed(f"gpu {device}", error)
        return
    for check in (_temperature, _power, _memory_errors, _remapped_rows, _clocks):
        # One by one: a MIG slice has no sensors of its own, and small cards have no ECC.
        try:
            yield from check(name, handle)
        except pynvml.NVMLError_NotSupported:
            continue
        except pynvml.NVMLError as error:
            yield failed(f"gpu {check.__name__.strip('_').replace('_', ' ')}", error)


def _temperature(name: str, handle: Any) -> Iterator[Finding]:
    celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    limit = pynvml.nvmlDeviceGetTemperatureThreshold(
        handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    )
    text = f"{name}: {celsius} C, slows down at {limit} C"
    if celsius >= limit - _NEAR_LIMIT:
        yield Finding("gpu temperature", "FAULT", text, "check that host's cooling", subject=name)
    else:
        yield Finding("gpu temperature", "ok", text, subject=name)


def _power(name: str, handle: Any) -> Iterator[Finding]:
    cap = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    default = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1000
    text = f"{name}: limited to {cap:.0f} W, default {default:.0f} W"
    if cap < default:
        remedy = f"restore the default with nvidia-smi -pl {default:.0f}"
        yield Finding("gpu power", "note", text, remedy, subject=name)
    else:
        yield Finding("gpu power", "ok", text, subject=name)


def _memory_errors(name: str, handle: Any) -> Iterator[Finding]:
    def errors(kind: int) -> int:
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, pynvml.NVML_VOLATILE_ECC))

    uncorrected = errors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
    corrected = errors(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)
    text = f"{name}: {uncorrected} uncorrected and {corrected} corrected since the driver started"
    if uncorrected:
        remedy = "that GPU's results cannot be trusted: reset it, and replace it if errors recur"
        yield Finding("gpu memory errors", "FAULT", text, remedy, subject=name)
    else:
        yield Finding("gpu memory errors", "ok", text, subject=name)


def _remapped_rows(name: str, handle: Any) -> Iterator[Finding]:
    _, _, pending, failure = pynvml.nvmlDeviceGetRemappedRows(handle)
    if failure:
        text = f"{name}: a faulty memory row could not be remapped"
        yield Finding("gpu memory rows", "FAULT", text, "replace the GPU", subject=name)
    elif pending:
        text = f"{name}: a faulty memory row is waiting to be remapped"
        remedy = "reset the GPU when no job is using it"
        yield Finding("gpu memory rows", "note", text, remedy, subject=name)


def _clocks(name: str, handle: Any) -> Iterator[Finding]:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    faults = [word for bit, word in _THROTTLED_BY_FAULT.items() if reasons & bit]
    if not faults and reasons & pynvml.nvmlClocksEventReasonHwSlowdown:
        faults = ["the hardware, because of temperature or power"]
    settings = [word for bit, word in _THROTTLED_BY_SETTING.items() if reasons & bit]
    if faults:
        text = f"{name}: throttled by {' and '.join(faults)}"
        remedy = "check that host's cooling and power supply"
        yield Finding("gpu clocks", "FAULT", text, remedy, subject=name)
    elif settings:
        text = f"{name}: throttled by {' and '.join(settings)}"
        yield Finding("gpu clocks", "note", text, subject=name)
    else:
        yield Finding("gpu clocks", "ok", f"{name}: not throttled", subject=name)
