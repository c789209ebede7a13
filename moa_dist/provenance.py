"""What a result was made with: sources, commit, Python, packages, and the image if it was in one.

Every run and every checkpoint records it. Needs nothing but the standard library.
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
"""Of this package's sources."""
IMAGE_VARIABLE = "MOA_DIST_IMAGE"
"""Names the file in an image that says what is in it (see `docker/record.py`)."""
_GIT_S = 10.0
_MOST_NAMED = 6


@dataclass(frozen=True)
class Image:
    """The image that a process runs in, as it was built."""

    base: str
    """Reference of the image that it builds on."""
    variant: str
    """`cpu` or `cuda`: which file of docker/ pins its packages."""
    revision: str
    """Commit that it was built from, or `unknown`."""
    python: str
    """Version."""
    packages: Mapping[str, str]
    """All that were installed, with their versions."""

    def __str__(self) -> str:
        """Such as `cpu on debian:12, built from 0123...`."""
        return f"{self.variant} on {self.base}, built from {self.revision}"


@dataclass(frozen=True)
class Provenance:
    """What a process runs on and from."""

    code: str
    """Hash of the sources, see `code_hash`."""
    commit: str | None
    """Of their repository, with `+changes` where files differ from it; None if not known."""
    python: str
    """Version."""
    packages: Mapping[str, str]
    """All that are installed, with their versions."""
    image: str | None
    """Variant, base and revision of the image, None outside of one."""

    def __str__(self) -> str:
        """What matters most, in a line."""
        named = [("Python", self.python)]
        named += [(name, self.packages.get(name, "missing")) for name in ("torch", "deepspeed")]
        words = [" ".join(pair) for pair in named]
        words.append(f"{len(self.packages)} packages, sources {self.code}")
        words += [f"commit {self.commit[:12]}{self.commit[40:]}"] if self.commit else []
        words += [f"image {self.image}"] if self.image else []
        return ", ".join(words)


def provenance() -> Provenance:
    """Of this process. Raises ClusterError if it runs in an image that does not say what it is."""
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


def differences(then: Provenance, now: Provenance) -> str | None:
    """In words, or None if sources, Python and packages are the same."""
    found = list(_changes({"Python": then.python}, {"Python": now.python}))
    found += _changes(then.packages, now.packages)
    found += _changes({"sources": then.code}, {"sources": now.code})
    if not found:
        return None
    more = [f"and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else []
    return ", ".join(found[:_MOST_NAMED] + more)


def changed_since_build(image: Image) -> str | None:
    """How this environment differs from that of the image as it was built, or None."""
    return ", ".join(_changes(image.packages, installed_packages())) or None


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        before, after = (side.get(name, "missing") for side in (then, now))
        if before != after:
            yield f"{name} {after} instead of {before}"


def image_record() -> Image | None:
    """The image that this process runs in; None outside of one.

    Raises ClusterError if its record is missing or damaged.
    """
    path = os.environ.get(IMAGE_VARIABLE)
    if path is None:
        return None
    try:
        return Image(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{path}: no record of an image ({error}); build the image again, or unset "
            f"{IMAGE_VARIABLE}"
        ) from error


def installed_packages() -> dict[str, str]:
    """Version of every distribution that this Python finds, by normalized name, in order."""
    found: dict[str, str] = {}
    # setuptools, once imported, adds a folder of its own copies of packages.
    path = [folder for folder in sys.path if Path(folder).name != "_vendor"]
    for distribution in metadata.distributions(path=path):
        name = distribution.metadata["Name"]
        if name is not None:  # None is what an interrupted installation leaves
            name = re.sub(r"[-_.]+", "-", name).lower()
            found.setdefault(name, distribution.version)  # the first one is what imports see
    return dict(sorted(found.items()))


def code_hash() -> str:
    """Names and contents of all sources of this package, in 16 hexadecimal digits."""
    total = hashlib.sha256()
    for file in sorted(FOLDER.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(FOLDER).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def _commit() -> str | None:
    """Of the repository that tracks the sources, if git knows one."""
    # An installed package may lie in the folder of somebody else's repository.
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
