"""Whether Triton can compile on this machine: it builds a launcher in C for every kernel."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def triton_problem() -> str | None:
    """Say why Triton cannot be used in this process; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    return compiler_problem(os.environ, Path(_include_folder()))


def compiler_problem(environment: Mapping[str, str], include: Path) -> str | None:
    """Say what Triton lacks to build its launchers; None if nothing, or if it interprets kernels.

    It looks for the compiler in CC, or else for gcc or clang in PATH. `include` is the folder of
    Python's headers.
    """
    if environment.get("TRITON_INTERPRET") == "1":
        return None
    given, path = environment.get("CC"), environment.get("PATH")
    names = [given] if given is not None else ["gcc", "clang"]
    if not any(shutil.which(name, path=path) for name in names):
        return f"Triton finds no C compiler ({' or '.join(names)})"
    if not (include / "Python.h").exists():
        return f"Triton finds no Python.h in {include}"
    return None


def _include_folder() -> str:
    """Return the folder of Python's headers, as Triton determines it."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, `posix_local`, names a folder that does not exist.
    return sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
