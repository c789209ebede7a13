"""The NVIDIA GPUs of this machine, whether torch can use them or not.

`python -m moa_dist.distributed.gpus` prints how many torch can use. It exits with 2 if the machine
has GPUs and torch can use none, unless CUDA_VISIBLE_DEVICES hides them. Torch is imported only when
it is asked, since the processes that start ranks do without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pynvml

from moa_dist.errors import ClusterError, ExitCode

CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"
DEVICE_FILES = Path("/dev")
"""Folder where the driver's kernel module lists GPUs as `nvidia0`, `nvidia1`, ..."""


class UnusableGpus(NamedTuple):
    """GPUs that this machine has and torch cannot use."""

    text: str
    """What is wrong."""
    remedy: str
    """What to do about it."""


def num_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine, whether visible or not.

    NVML fails if its library is missing, or no longer matches the driver after an update; then the
    driver's device files count.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return sum(1 for _ in DEVICE_FILES.glob("nvidia[0-9]*"))
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides all GPUs: empty, -1, or as Slurm writes it."""
    given = environment.get(CUDA_VARIABLE)
    return given is not None and (
        given.strip() in ("", "NoDevFiles") or given.strip().startswith("-")
    )


def unusable_gpus(environment: Mapping[str, str] = os.environ) -> UnusableGpus | None:
    """Describe GPUs that torch cannot use, although nobody has hidden them; None if all is well."""
    import torch

    if torch.cuda.is_available() or hides_gpus(environment):
        return None
    present = num_gpus()
    if not present:
        return None
    text = f"this machine has {present} GPUs, but torch {torch.__version__} can use none of them"
    return UnusableGpus(
        text,
        f"{_remedy(environment)}. To compute on the CPU nevertheless, hide the GPUs from the "
        f"command: {CUDA_VARIABLE}= COMMAND",
    )


def _remedy(environment: Mapping[str, str]) -> str:
    import torch

    if torch.version.cuda is None:
        return "install a CUDA build of torch"
    supported = _cuda_of_driver()
    # Within a major version, CUDA works with older drivers.
    if supported is not None and supported[0] < int(torch.version.cuda.split(".")[0]):
        return (
            f"update the driver, which supports CUDA {'.'.join(map(str, supported))} while torch "
            f"was built for {torch.version.cuda}, or install a torch for an older CUDA"
        )
    check = "look into `nvidia-smi`, or restart after an update of the driver"
    listed = environment.get(CUDA_VARIABLE)
    return check if listed is None else f"check {CUDA_VARIABLE}={listed}; else {check}"


def _cuda_of_driver() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver supports; None if it cannot be asked."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())  # 12040 is 12.4
        return version // 1000, version % 1000 // 10
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def require_usable_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to compute on the CPU of a machine whose GPUs torch cannot use.

    Raises:
        ClusterError: It has GPUs, torch sees none, and CUDA_VISIBLE_DEVICES does not hide them.
    """
    found = unusable_gpus(environment)
    if found is not None:
        raise ClusterError(f"{found.text}: {found.remedy}")


def main() -> int:
    """Print how many GPUs torch can use; returns the exit status."""
    try:
        require_usable_gpus()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER
    import torch

    print(torch.cuda.device_count())
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
