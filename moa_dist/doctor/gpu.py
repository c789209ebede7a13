"""Health of GPUs through NVML: heat, power, memory errors, and what holds the clocks down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pynvml
import torch

from moa_dist.doctor.finding import Finding, failed
from moa_dist.observe.gpu import device_handle

_NEAR_LIMIT = 5
"""Degrees below the temperature at which a GPU slows down that are worth a word."""
_SLOWED_BY_FAULT = {
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat (hardware)",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat (driver)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply's brake",
}
_SLOWED_AS_SET = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "the power cap",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "application clocks that were set",
}


def check_gpus(devices: list[torch.device]) -> Iterator[Finding]:
    """Findings of each device; that NVML is absent is said once, and no fault."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding("gpu", "note", f"no GPU health: {error}")
        return
    try:
        if not devices and pynvml.nvmlDeviceGetCount():
            text = f"this machine has {pynvml.nvmlDeviceGetCount()} GPUs, but torch sees none"
            remedy = "install torch for CUDA (a CPU build?), or look at CUDA_VISIBLE_DEVICES"
            yield Finding("gpu", "FAULT", text, remedy)
        for device in devices:
            yield from _check_gpu(device)
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str:
    """Of the NVIDIA driver; `none` where NVML does not answer."""
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
        # One by one: a MIG slice has no sensors of its own, small cards no ECC.
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
        yield Finding("gpu temperature", "FAULT", text, "look at the cooling of that host")
    else:
        yield Finding("gpu temperature", "ok", text)


def _power(name: str, handle: Any) -> Iterator[Finding]:
    cap = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    default = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1000
    text = f"{name}: capped at {cap:.0f} W, by default {default:.0f} W"
    if cap < default:
        yield Finding("gpu power", "note", text, f"nvidia-smi -pl {default:.0f} gives it back")
    else:
        yield Finding("gpu power", "ok", text)


def _memory_errors(name: str, handle: Any) -> Iterator[Finding]:
    def errors(kind: int) -> int:
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, pynvml.NVML_VOLATILE_ECC))

    uncorrected = errors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
    corrected = errors(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)
    text = f"{name}: {uncorrected} uncorrected and {corrected} corrected since the driver started"
    if uncorrected:
        remedy = "results of that GPU cannot be trusted: reset it, replace it if they come again"
        yield Finding("gpu memory errors", "FAULT", text, remedy)
    else:
        yield Finding("gpu memory errors", "ok", text)


def _remapped_rows(name: str, handle: Any) -> Iterator[Finding]:
    _, _, pending, failure = pynvml.nvmlDeviceGetRemappedRows(handle)
    if failure:
        text = f"{name}: a broken row of memory could not be replaced"
        yield Finding("gpu memory rows", "FAULT", text, "take the GPU out of service")
    elif pending:
        text = f"{name}: a broken row of memory waits to be replaced"
        yield Finding("gpu memory rows", "note", text, "reset the GPU when no job is on it")


def _clocks(name: str, handle: Any) -> Iterator[Finding]:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    bad = [word for bit, word in _SLOWED_BY_FAULT.items() if reasons & bit]
    if not bad and reasons & pynvml.nvmlClocksEventReasonHwSlowdown:
        bad = ["the hardware: heat or power"]
    set_so = [word for bit, word in _SLOWED_AS_SET.items() if reasons & bit]
    if bad:
        text = f"{name}: slowed down by {' and '.join(bad)}"
        yield Finding("gpu clocks", "FAULT", text, "look at cooling and power of that host")
    elif set_so:
        yield Finding("gpu clocks", "note", f"{name}: held down by {' and '.join(set_so)}")
    else:
        yield Finding("gpu clocks", "ok", f"{name}: nothing holds the clocks down")
