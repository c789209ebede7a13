"""Records what a result was made with: sources, commit, Python, packages and container image.

Every run and every checkpoint stores it. This module imports only the standard library, besides
`moa_dist.errors`, so `docker/build.sh` can use it before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from moa_dist.errors import ClusterError

FOLDER = Path(__file__).parent
"""Folder of this package's sources."""
IMAGE_VARIABLE = "MOA_DIST_IMAGE"
"""Environment variable with the path of an image's record (written by `docker/record.py`)."""
_GIT_S = 10.0
_MAX_LISTED = 6
NUMERIC_PACKAGES = ("deepspeed", "flash-attn", "numpy", "torch", "triton")
"""Packages that the numbers of a run depend on, besides NVIDIA's libraries."""


@dataclass(frozen=True)
class Image:
    """The container image that a process runs in, as it was built."""

    base: str
    """Reference of the base image."""
    variant: str
    """`cpu` or `cuda`: selects the requirements file in docker/ that pins the packages."""
    revision: str
    """Commit that the image was built from, or `unknown`."""
    python: str
    """Version of Python."""
    packages: Mapping[str, str]
    """Version of each package that was installed."""

    def __str__(self) -> str:
        """Summarize, such as `cpu on debian:12, built from 0123...`."""
        return f"{self.variant} on {self.base}, built from {self.revision}"


@dataclass(frozen=True)
class Provenance:
    """The sources and software that a process runs."""

    code: str
    """Hash of the sources, see `code_hash`."""
    commit: str | None
    """Commit of the sources, with `+changes` if files differ from it; None if unknown."""
    python: str
    """Version of Python."""
    packages: Mapping[str, str]
    """Version of each installed package."""
    image: str | None
    """Variant, base and revision of the container image; None outside of one."""

    def __str__(self) -> str:
        """Summarize the most important versions in one line."""
        named = [("Python", self.python)]
        named += [(name, self.packages.get(name, "missing")) for name in ("torch", "deepspeed")]
        words = [" ".join(pair) for pair in named]
        words.append(f"{len(self.packages)} packages, sources {self.code}")
        words += [f"commit {self.commit[:12]}{self.commit[40:]}"] if self.commit else []
        words += [f"image {self.image}"] if self.image else []
        return ", ".join(words)


@dataclass(frozen=True)
class Change:
    """A version that differs between two environments."""

    name: str
    """The package, or `Python` or `sources`."""
    before: str
    """The old version, or `missing`."""
    after: str
    """The new version, or `missing`."""

    def __str__(self) -> str:
        """Describe the change, such as `torch 2.13.0 instead of 2.12.0`."""
        return f"{self.name} {self.after} instead of {self.before}"


def provenance() -> Provenance:
    """Return the provenance of this process.

    Raises:
        ClusterError: It runs in an image whose record is missing or damaged.
    """
    image = image_record()
    commit = _commit()
    if image is not None and commit is None and image.revision != "unknown":
        commit = image.revision
    return Provenance(
        code=code_hash(),
        commit=commit,
        python=platform.python_version(),
        packages=installed_packages(),
        image=None if image is None else str(image),
    )


def changes(then: Provenance, now: Provenance) -> list[Change]:
    """List what differs: Python, packages and sources, in this order."""
    return [
        *_changes({"Python": then.python}, {"Python": now.python}),
        *_changes(then.packages, now.packages),
        *_changes({"sources": then.code}, {"sources": now.code}),
    ]


def differences(then: Provenance, now: Provenance) -> str | None:
    """Describe the first changes that numbers may depend on in one line; None without any."""
    found = [change for change in changes(then, now) if _matters(change)]
    if not found:
        return None
    rest = len(found) - _MAX_LISTED
    more = [f"and {rest} more"] if rest > 0 else []
    return ", ".join([*map(str, found[:_MAX_LISTED]), *more])


def _matters(change: Change) -> bool:
    named = ("Python", "sources", *NUMERIC_PACKAGES)
    return change.name in named or change.name.startswith("nvidia-")


def changed_since_build(image: Image) -> list[Change]:
    """List the packages of this environment that differ from the image as it was built."""
    return list(_changes(image.packages, installed_packages()))


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Change]:
    for name in sorted({*then, *now}):
        before, after = (side.get(name, "missing") for side in (then, now))
        if before != after:
            yield Change(name, before, after)


def image_record() -> Image | None:
    """Return the image that this process runs in; None outside of one.

    Raises:
        ClusterError: The image's record is missing or damaged.
    """
    path = os.environ.get(IMAGE_VARIABLE)
    if path is None:
        return None
    try:
        return Image(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{path}: the image's record cannot be read ({error}); rebuild the image, or unset "
            f"{IMAGE_VARIABLE}"
        ) from error


def installed_packages() -> dict[str, str]:
    """Return the version of every installed distribution by normalized name, sorted."""
    found: dict[str, str] = {}
    # setuptools, once imported, adds a folder with its own copies of packages to the path.
    path = [folder for folder in sys.path if Path(folder).name != "_vendor"]
    for distribution in metadata.distributions(path=path):
        name = distribution.metadata["Name"]
        if name is not None:  # None after an interrupted installation
            name = re.sub(r"[-_.]+", "-", name).lower()
            found.setdefault(name, distribution.version)  # imports see the first one
    return dict(sorted(found.items()))


def code_hash() -> str:
    """Hash the names and contents of all sources of this package to 16 hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(FOLDER.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(FOLDER).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def _commit() -> str | None:
    """Return the commit of the repository that tracks the sources, or None."""
    # An installed package may lie inside an unrelated repository.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".")
    return commit and commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(FOLDER), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
