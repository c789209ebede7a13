"""Pin the packages of the images: `python docker/lock.py TORCH`, such as 2.13.0.

Writes `requirements-cpu.txt` and `requirements-cuda.txt`, each with all packages of an image, and
`requirements-test.txt`, with what the tests need in addition: exact versions, and the hashes of the
files that pip chose. They are valid for the Python and the machine that this script runs on, so
run it with the Python of the image's base (CPython 3.11 on x86-64 Linux) and with pip 23 or newer,
where pip finds builds of torch for CPUs (TORCH+cpu) as well as those for CUDA. Nothing is
installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
Pins = dict[str, str]
"""Package -> its lines in a requirements file."""


def main() -> None:
    """Resolve all package sets, and write the files."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("torch", metavar="TORCH", help="version of torch, without its build")
    torch = parser.parse_args().torch
    root = str(FOLDER.parent)
    cpu = resolve(root, "pip", f"torch==={torch}+cpu")
    cuda = resolve(root, "pip", f"torch==={torch}")
    # The tests run Triton on CPUs, in the version that torch uses on GPUs.
    triton = cuda["triton"].split()[0]
    both = resolve(f"{root}[dev]", "pip", f"torch==={torch}+cpu", triton)
    assert cpu.items() <= both.items(), "the tests' packages would change the image's"
    test = {name: lines for name, lines in both.items() if name not in cpu}
    for name, pins in (("cpu", cpu), ("cuda", cuda), ("test", test)):
        write(FOLDER / f"requirements-{name}.txt", torch, pins)
        print(f"requirements-{name}.txt: {len(pins)} packages")


def resolve(*requirements: str) -> Pins:
    """Return what pip would install into an empty environment, without moa-dist itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", str(report), *requirements]
        subprocess.run(command, check=True)
        chosen = json.loads(report.read_text())["install"]
    return dict(sorted(pin(package) for package in chosen if not is_local(package)))


def is_local(package: dict) -> bool:
    """Return whether a package is a local folder rather than a file from an index."""
    return "dir_info" in package["download_info"]


def pin(package: dict) -> tuple[str, str]:
    """Return a package's name in lower case, and the lines that pin the file that pip chose."""
    name, version = (package["metadata"][key] for key in ("name", "version"))
    sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return name.lower(), f"{name}=={version} \\\n    --hash=sha256:{sha256}\n"


def write(path: Path, torch: str, pins: Pins) -> None:
    """Write a requirements file, with a heading that says how it was made."""
    python = f"{platform.python_implementation()} {platform.python_version_tuple()[0]}."
    python += platform.python_version_tuple()[1]
    heading = f"# Made by `python docker/lock.py {torch}`, for {python} on {platform.machine()}.\n"
    path.write_text(heading + "".join(pins.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
