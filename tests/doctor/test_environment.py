"""A machine's faults are found and named, and no failing check hides the others."""

import errno
import os
import socket
from importlib import metadata

import psutil
import pytest

from moa_dist.doctor import environment
from moa_dist.doctor.environment import check_environment, check_port
from moa_dist.doctor.finding import Finding, guarded
from moa_dist.doctor.packages import check_packages, package_versions


@pytest.fixture
def versions(monkeypatch):
    """Installed versions, which a test may change."""
    changed = {}
    real = metadata.version

    def version(name):
        if name not in changed:
            return real(name)
        if changed[name] is None:
            raise metadata.PackageNotFoundError(name)
        return changed[name]

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_busy_port_is_named_with_its_holder(address):
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        (finding,) = check_port(port)
    assert finding.is_fault
    name = psutil.Process().name()
    assert finding.subject == str(port)
    assert os.strerror(errno.EADDRINUSE) in finding.text
    assert f"{name} (pid {os.getpid()})" in finding.text
    assert "--master_port" in finding.remedy
    (finding,) = check_port(port)
    assert (finding.status, finding.subject) == ("ok", str(port))


def test_a_holder_that_cannot_be_seen_is_left_to_root(monkeypatch):
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (finding,) = check_port(port)
    assert finding.is_fault
    assert f"ss -ltnp 'sport = :{port}'" in finding.text


def test_the_installed_packages_are_in_their_ranges():
    findings = list(check_packages())
    assert {f.subject for f in findings} >= {"torch", "deepspeed", "webdataset"}
    assert not [f for f in findings if f.is_fault]
    assert not any("pytest" in f.text for f in findings)  # an extra


def test_a_package_outside_its_range_or_missing_is_a_fault(versions):
    versions |= {"webdataset": "0.2.100", "deepspeed": None}
    faults = {f.subject: f for f in check_packages() if f.is_fault}
    assert set(faults) == {"webdataset", "deepspeed"}
    assert faults["webdataset"].text.startswith("webdataset 0.2.100 ")
    for name, fault in faults.items():
        assert fault.text.startswith(f"{name} ")
        assert fault.remedy.startswith(f"pip install '{name}")
    assert package_versions()["deepspeed"] == "missing"


def test_a_check_that_fails_is_a_finding_and_stops_no_other(monkeypatch):
    def broken():
        yield Finding("memory", "ok", "so far so good")
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(environment, "_memory", broken)
    findings = check_environment()
    memory = [f for f in findings if f.check == "memory"]
    assert [f.status for f in memory] == ["ok", "FAULT"]
    assert "RuntimeError: no /proc here" in memory[1].text
    assert {"system", "disk", "package", "torch"} <= {f.check for f in findings}
    assert [f for f in findings if f.is_fault] == [memory[1]]


def test_a_port_that_is_not_a_number_is_a_finding():
    (finding,) = guarded("port", lambda: check_port(int("x")))
    assert finding.is_fault
    assert "ValueError" in finding.text
