"""Checks the installed packages against the ranges in pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from moa_dist.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "moa-dist"
_KERNELS = "triton"
"""Not listed in pyproject.toml, but torch compiles kernels with it."""


def check_packages() -> Iterator[Finding]:
    """Check each package that pyproject.toml requires, from the installed metadata."""
    for wanted in _requirements():
        installed = installed_version(wanted.name)
        install = f"pip install '{wanted.name}{wanted.specifier}'"
        if installed is None:
            text = f"{wanted.name} is not installed; {wanted.specifier} is required"
            yield Finding("package", "FAULT", text, install, subject=wanted.name)
        elif not wanted.specifier.contains(installed, prereleases=True):
            text = f"{wanted.name} {installed} is outside the range {wanted.specifier}"
            yield Finding("package", "FAULT", text, install, subject=wanted.name)
        else:
            text = f"{wanted.name} {installed} ({wanted.specifier})"
            yield Finding("package", "ok", text, subject=wanted.name)


def package_versions() -> dict[str, str]:
    """Return the versions of all required packages, and of torch's kernel compiler."""
    names = [wanted.name for wanted in _requirements()]
    return {name: installed_version(name) or "missing" for name in (*names, _KERNELS)}


def _requirements() -> list[Requirement]:
    """Return the requirements of moa-dist itself, without those of its extras."""
    from packaging.requirements import Requirement  # if it is missing, that is a finding

    lines = metadata.requires(DISTRIBUTION) or []
    every = [Requirement(line) for line in lines]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed_version(name: str) -> str | None:
    """Return a package's version from its metadata, without importing it; None if missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
