"""Checks this machine: its software, its resources, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.packages import check_packages
from moa_dist.provenance import changed_since_build, image_record, provenance

DEFAULT_PORT = 29500
"""Default port of the launchers."""
_SHARED = Path("/dev/shm")
_MIN_SHARED = 2**30
_GIB = 2**30


def check_environment() -> list[Finding]:
    """Run all checks that need no configuration, no GPU and no other rank."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "system": _system,
        "provenance": _provenance,
        "memory": _memory,
        "disk": _disk,
        "package": check_packages,
        "torch": _torch,
        "triton": check_triton,
    }
    return [finding for name, check in checks.items() for finding in guarded(name, check)]


def _system() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding("system", "ok", f"{python} on {platform.platform()}, host {platform.node()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("system", "ok", f"{cores} of {os.cpu_count()} cores usable, {_processor()}")


def _provenance() -> Iterator[Finding]:
    yield Finding("provenance", "ok", str(provenance()))
    image = image_record()
    changes = [] if image is None else changed_since_build(image)
    if changes:
        text = f"packages have changed since the image was built: {', '.join(map(str, changes))}"
        names = ", ".join(change.name for change in changes)
        remedy = "to keep them, run docker/lock.py and rebuild the image"
        yield Finding("provenance", "note", text, remedy, subject=names)


def _processor() -> str:
    """Return the processor's model as Linux names it; on other systems, as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    free = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    yield Finding("memory", "ok", free)
    if not _SHARED.is_dir():
        return
    total = shutil.disk_usage(_SHARED).total
    text = f"{total / _GIB:.2f} GiB in {_SHARED}"
    if total < _MIN_SHARED:
        remedy = "NCCL and data workers need more; in a container: docker run --shm-size=8g"
        yield Finding("memory", "note", text, remedy, subject=str(_SHARED))
    else:
        yield Finding("memory", "ok", text, subject=str(_SHARED))


def _disk() -> Iterator[Finding]:
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        usage = shutil.disk_usage(folder)
        free = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free in {folder}"
        yield Finding("disk", "ok", free)


def _torch() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        text = f"torch {torch.__version__} is built without torch.distributed or gloo"
        yield Finding("torch", "FAULT", text, "install an official build of torch")
        return
    words = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda or 'none'}"]
    if dist.is_nccl_available():
        words.append(f"NCCL {nccl_version()}")
    words.append(f"{torch.cuda.device_count()} GPUs")
    yield Finding("torch", "ok", ", ".join(words))


def check_triton() -> Iterator[Finding]:
    """Check that Triton can compile, where it is installed or a GPU needs it."""
    import torch

    from moa_dist.kernels.triton_support import triton_problem

    needed, problem = torch.cuda.is_available(), triton_problem()
    if problem is None:
        yield Finding("triton", "ok", "Triton can compile")
    elif needed or find_spec("triton"):
        remedy = "install gcc and Python's headers (Debian: apt install gcc libc6-dev python3-dev)"
        yield Finding(
            "triton",
            "FAULT" if needed else "note",
            f"{problem}: on GPUs, some experts would run one by one",
            remedy,
        )


def nccl_version() -> str:
    """Return NCCL's version, such as 2.27.3; `none` if torch was built without NCCL."""
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))


def check_port(port: int) -> Iterator[Finding]:
    """Check whether the rendezvous port is free, and which process is using it."""
    try:
        with closing(socket.create_server(("", port))):
            yield Finding("port", "ok", f"port {port} is free", subject=str(port))
    except OSError as error:
        holder = port_holder(port)
        text = f"port {port} cannot be used ({os.strerror(error.errno or 0)})" + (
            holder and f": {holder}"
        )
        remedy = "end that process, or start with another port: --master_port N"
        yield Finding("port", "FAULT", text, remedy, subject=str(port))


def port_holder(port: int) -> str:
    """Describe the process that listens on the port; empty if none does any more.

    Its arguments are left out, because reports are pasted in public.
    """
    import psutil

    try:
        listening = [
            connection
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        pids = sorted({connection.pid for connection in listening if connection.pid})
        if pids:
            return "in use by " + ", ".join(f"{psutil.Process(p).name()} (pid {p})" for p in pids)
    except psutil.Error:  # it has ended in the meantime, or connections cannot be listed
        return ""
    return f"in use by a process that only root can identify (ss -ltnp 'sport = :{port}')"
