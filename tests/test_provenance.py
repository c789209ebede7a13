"""Results record what they were made with, and later changes are named."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest

from moa_dist import provenance as module
from moa_dist.doctor.environment import check_environment
from moa_dist.doctor.finding import Finding
from moa_dist.errors import ClusterError
from moa_dist.provenance import (
    IMAGE_VARIABLE,
    Change,
    Image,
    Provenance,
    changes,
    code_hash,
    differences,
    installed_packages,
    provenance,
)

THEN = Provenance("0" * 16, "a" * 40, "3.11.2", {"numpy": "2.1", "torch": "2.12.0"}, None)
IMAGE = Image("debian:12", "cpu", "b" * 40, "3.11.2", {"torch": "2.13.0+cpu"})


@pytest.fixture(autouse=True)
def no_image(monkeypatch):
    monkeypatch.delenv(IMAGE_VARIABLE, raising=False)


@pytest.fixture
def image(tmp_path, monkeypatch):
    """Pretend to be in an image with the installed packages; returns the file of its record."""
    file = tmp_path / "image.json"
    file.write_text(json.dumps(asdict(replace(IMAGE, packages=installed_packages()))))
    monkeypatch.setenv(IMAGE_VARIABLE, str(file))
    return file


def reported() -> list[Finding]:
    """What the doctor reports about it."""
    return [f for f in check_environment() if f.check == "provenance"]


def test_a_process_knows_what_it_runs_on():
    own = provenance()
    assert own.packages["torch"] == metadata.version("torch")
    assert own.packages["moa-dist"] == metadata.version("moa-dist")
    assert own.python == sys.version.split()[0]
    assert own.image is None
    for word in (own.code, own.python, f"torch {own.packages['torch']}"):
        assert word in str(own)
    assert differences(own, provenance()) is None
    assert reported() == [Finding("provenance", "ok", str(own))]


def test_what_has_changed_is_named():
    now = replace(THEN, packages={"torch": "2.13.0", "triton": "3.7"}, commit="c" * 40)
    assert changes(THEN, now) == [
        Change("numpy", "2.1", "missing"),
        Change("torch", "2.12.0", "2.13.0"),
        Change("triton", "missing", "3.7"),
    ]
    assert differences(THEN, now) == ", ".join(map(str, changes(THEN, now)))
    now = replace(THEN, python="3.12.0", code="1" * 16)
    assert changes(THEN, now) == [
        Change("Python", "3.11.2", "3.12.0"),
        Change("sources", "0" * 16, "1" * 16),
    ]
    many = replace(THEN, packages={f"nvidia-{i}": "1" for i in range(20)})
    *listed, rest = differences(THEN, many).split(", ")
    assert listed == [str(change) for change in changes(THEN, many)[: len(listed)]]
    assert re.findall(r"\d+", rest) == ["16"]
    assert len(listed) + 16 == len(changes(THEN, many))


def test_the_hash_is_of_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "a.py").write_text("x")
    hashes = [code_hash()]
    (tmp_path / "a.py").write_text("y")
    hashes.append(code_hash())
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    hashes.append(code_hash())
    (tmp_path / "notes.txt").write_text("no source")
    assert len(set(hashes)) == 3
    assert code_hash() == hashes[-1]


def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert provenance().commit is None  # no repository
    if shutil.which("git") is None:  # as in an image
        return
    git("init")
    (tmp_path / "provenance.py").write_text("x")
    git("commit", "--allow-empty", "-m", "of something else")
    assert provenance().commit is None  # sources that the repository does not hold
    git("add", ".")
    git("commit", "-m", "first")
    assert provenance().commit == git("rev-parse", "HEAD")
    (tmp_path / "provenance.py").write_text("y")
    assert provenance().commit == git("rev-parse", "HEAD") + "+changes"


def test_the_image_is_named(image, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", image.parent)  # without a repository, as in an image
    own = provenance()
    assert own.commit == IMAGE.revision
    assert own.image == str(IMAGE)
    assert all(word in own.image for word in (IMAGE.variant, IMAGE.base, IMAGE.revision))
    assert reported() == [Finding("provenance", "ok", str(own))]


def test_packages_that_the_image_did_not_have_are_noted(image):
    image.write_text(json.dumps(asdict(IMAGE)))
    (_, finding) = reported()
    assert finding.status == "note"
    assert "moa-dist" in finding.subject.split(", ")
    assert str(Change("moa-dist", "missing", metadata.version("moa-dist"))) in finding.text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"base": "x"}'])
def test_an_image_without_its_record_is_one_error(image, content):
    if content is None:
        image.unlink()
    else:
        image.write_text(content)
    with pytest.raises(ClusterError, match=rf"image\.json: .*{IMAGE_VARIABLE}"):
        provenance()


def test_it_needs_only_the_standard_library():
    """`docker/build.sh` hashes the sources before anything is installed."""
    root = str(Path(module.__file__).parents[1])
    command = (
        f"import sys; sys.path.insert(0, {root!r}); "
        "from moa_dist.provenance import code_hash; print(code_hash())"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", command],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.strip() == code_hash()
