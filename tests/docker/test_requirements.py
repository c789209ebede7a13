"""The images' pinned packages meet pyproject.toml's requirements, and agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}\n")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, Version]:
    heading, body = (ROOT / f"docker/requirements-{name}.txt").read_text().split("\n", 1)
    assert heading.startswith("# Made by `python docker/lock.py ")
    assert PIN.sub("", body) == ""  # nothing that is not pinned
    return {canonicalize_name(package): Version(version) for package, version in PIN.findall(body)}


def extra(name: str) -> list[Requirement]:
    """The requirements of an extra, including those of other extras that it refers to."""
    found = []
    for line in map(Requirement, PROJECT["optional-dependencies"][name]):
        found += [r for e in line.extras for r in extra(e)] if line.name == "moa-dist" else [line]
    return found


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_an_image_has_what_the_package_requires(variant):
    pinned = pins(variant)
    for wanted in map(Requirement, PROJECT["dependencies"]):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted


def test_the_tests_have_what_they_require():
    pinned = pins("cpu") | pins("test")
    for wanted in extra("dev"):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted


def test_images_differ_only_in_their_device():
    cpu, cuda = pins("cpu"), pins("cuda")
    assert (cpu["torch"].local, cuda["torch"].local) == ("cpu", None)
    assert cpu["torch"].release == cuda["torch"].release
    assert {name: cuda[name] for name in cpu if name != "torch"} == {
        name: version for name, version in cpu.items() if name != "torch"
    }
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in cuda.keys() - cpu.keys())
    test = pins("test")
    assert not test.keys() & cpu.keys()
    shared = test.keys() & cuda.keys()
    assert {name: test[name] for name in shared} == {name: cuda[name] for name in shared}
