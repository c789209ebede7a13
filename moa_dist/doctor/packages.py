"""Packages of this installation, and whether they are what it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from moa_dist.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "moa-dist"
_KERNELS = "triton"
"""Not asked for by name, but torch compiles with it."""


def check_packages() -> Iterator[Finding]:
    """A finding per package that pyproject.toml asks for, from the installed metadata."""
    for wanted in _requirements():
        installed = installed_version(wanted.name)
        install = f"pip install '{wanted.name}{wanted.specifier}'"
        if installed is None:
            text = f"{wanted.name} is not installed; {wanted.specifier} is asked for"
            yield Finding("package", "FAULT", text, install)
        elif not wanted.specifier.contains(installed, prereleases=True):
            text = f"{wanted.name} {installed} is outside the range {wanted.specifier}"
            yield Finding("package", "FAULT", text, install)
        else:
            yield Finding("package", "ok", f"{wanted.name} {installed} ({wanted.specifier})")


def package_versions() -> dict[str, str]:
    """Versions of what pyproject.toml asks for, and of what torch compiles kernels with."""
    names = [wanted.name for wanted in _requirements()]
    return {name: installed_version(name) or "missing" for name in (*names, _KERNELS)}


def _requirements() -> list[Requirement]:
    """Of moa-dist itself, without those of its extras."""
    from packaging.requirements import Requirement  # may be missing, which is then a finding

    lines = metadata.requires(DISTRIBUTION) or []
    every = [Requirement(line) for line in lines]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed_version(name: str) -> str | None:
    """Of a package by its metadata, which importing it is not needed for."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
