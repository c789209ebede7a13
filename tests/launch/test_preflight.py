"""What preflight concludes from the answers of hosts; the hosts are fakes."""

import time
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.config.run import Config, run_folder
from moa_dist.doctor.host import probe_file
from moa_dist.launch import preflight as module
from moa_dist.launch.checked_host import NoAnswerError
from moa_dist.launch.hostfile import Host
from moa_dist.launch.preflight import Preflight, Wanted, preflight
from moa_dist.launch.rendezvous import rendezvous_address

ROOT = Path(__file__).parents[2]
FACTS = {"code": "c0de", "torch": "2.13.0"}


class FakeHost:
    """A host whose answers are given."""

    def __init__(self, run: Path | None = None, address="10.0.0.1", **answers) -> None:
        self.run, self.address, self.answers = run, address, answers
        self.asked: list[dict] = []

    def ask(self, request: dict) -> dict:
        self.asked.append(request)
        given = self.answers.get(request["do"], {})
        if isinstance(given, Exception):
            raise given
        if request["do"] == "report":
            if self.run is not None and request["token"] is not None:
                probe_file(self.run, request["token"], str(request["node"])).touch()
            usual = {"facts": FACTS, "findings": [], "num_gpus": 0}
            return {**usual, "client": "10.0.0.1", "address": self.address, **given}
        usual = {
            "clock": {"time": time.time()},
            "listen": {"port": request.get("port"), "problem": None},
            "reach": {"interface": "eth0", "problem": None},
        }
        return {**usual[request["do"]], **given}

    def close(self) -> None:
        pass


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(
        str(ROOT / "configs/small/moeut.yaml"),
        [f"output={tmp_path}", "name=x", "data.train=none", "parallel.expert_parallel=2"],
    )


def check(config: Config | None, slots=(1, 1), wanted=None, **hosts: FakeHost) -> Preflight:
    wanted = wanted or Wanted(config, "x.yaml" if config else None)
    return preflight(hosts, slots, wanted)


def faults(found: Preflight) -> list[tuple[str, tuple[str, ...], str]]:
    """Check, hosts and subject of each fault."""
    return [(fault.check, fault.hosts, fault.subject) for fault in found.faults]


def test_hosts_that_agree_are_fit_and_get_a_rendezvous(config):
    run = run_folder(config)
    found = check(config, a=FakeHost(run), b=FakeHost(run, "10.0.0.2"))
    assert not faults(found)
    assert found.hosts == [Host("a", 1), Host("b", 1)]
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 29500)
    assert not list(run.iterdir())  # what hosts wrote to find each other


def test_without_slots_there_is_a_rank_per_gpu(config):
    run, report = run_folder(config), {"num_gpus": 4}
    hosts = {"a": FakeHost(run, report=report), "b": FakeHost(run, report=report)}
    found = check(config, (None, None), **hosts)
    assert [host.slots for host in found.hosts] == [4, 4]


def test_all_faults_are_reported_at_once(config):
    run = run_folder(config)
    old = FakeHost(
        run, report={"facts": FACTS | {"torch": "2.12.0"}}, clock={"time": time.time() - 9}
    )
    gone = FakeHost(run, report=NoAnswerError("cannot be reached", "look", unreachable=True))
    other_folder = {"check": "shared folder", "status": "FAULT", "text": "x", "remedy": "mount"}
    stray = FakeHost(None, report={"findings": [other_folder]})
    held = FakeHost(run, listen={"port": None, "problem": "in use"})
    found = check(config, (1, 1, 1, 1), a=held, b=old, c=gone, d=stray)
    assert sorted(faults(found)) == [
        ("clocks", ("b",), ""),
        ("host", ("c",), ""),
        ("port", ("a",), "29500"),
        ("shared folder", ("d",), ""),
        ("versions", ("b",), "torch"),
    ]
    by_check = {fault.check: fault for fault in found.faults}
    assert by_check["host"].remedy == "look"
    assert by_check["shared folder"].remedy == "mount"
    assert "--master-port" in by_check["port"].remedy
    assert all(word in by_check["versions"].text for word in ("host b", "2.12.0", "2.13.0"))


def test_host_that_wrote_elsewhere_is_named(config, monkeypatch):
    monkeypatch.setattr(module, "_VISIBLE_S", 0.0)
    run = run_folder(config)
    found = check(config, a=FakeHost(run), b=FakeHost(None))
    assert faults(found) == [("shared folder", ("b",), str(run))]


def test_batch_arithmetic_is_of_all_hosts_together(config):
    run = run_folder(config)
    found = check(config, (2, 1), a=FakeHost(run), b=FakeHost(run))
    assert {fault.check for fault in found.faults} == {"layout"}
    assert any("`parallel.expert_parallel`" in fault.text for fault in found.faults)


def test_another_port_is_used_and_noted(config):
    run = run_folder(config)
    first = FakeHost(run, listen={"port": 17000, "problem": "port 29500 is held by x"})
    found = check(config, a=first, b=FakeHost(run))
    assert not faults(found)
    assert found.master_port == 17000
    (note,) = (finding for finding in found.findings if finding.check == "port")
    assert (note.status, note.hosts, note.subject) == ("note", ("a",), "29500")
    assert "port 29500 is held by x" in note.text
    assert "17000" in note.text


def test_unreachable_rendezvous_is_a_fault(config):
    run = run_folder(config)
    far = FakeHost(
        run, reach={"interface": None, "problem": "cannot reach 10.0.0.1:29500: timed out"}
    )
    found = check(config, a=FakeHost(run), b=far)
    assert faults(found) == [("network", ("b",), "")]
    assert "10.0.0.1:29500" in found.faults[0].text
    assert "--master-addr" in found.faults[0].remedy


def test_only_hosts_that_may_come_back_count_as_unreachable(config):
    run = run_folder(config)
    gone = FakeHost(run, report=NoAnswerError("is silent", unreachable=True))
    broken = FakeHost(run, report=NoAnswerError("has no moa_dist"))
    found = check(config, (1, 1, 1), a=FakeHost(run), b=gone, c=broken)
    assert found.unreachable == ["b"]
    assert len(found.faults) >= 2


def test_hosts_alone_are_compared_without_a_configuration():
    found = check(None, a=FakeHost(), b=FakeHost(report={"facts": FACTS | {"code": "other"}}))
    assert faults(found) == [("versions", ("b",), "code")]
    assert all(word in found.faults[0].text for word in ("other", "c0de"))


@pytest.mark.parametrize(
    ("seen", "address"),
    [
        ([("10.0.0.1", "10.0.0.9"), ("10.0.0.2", "10.0.0.9")], "10.0.0.1"),
        ([("127.0.0.1", "127.0.0.1"), ("10.0.0.2", "10.0.0.9")], "10.0.0.9"),  # first one is here
        ([("127.0.1.1", "127.0.0.1")], "127.0.0.1"),
        ([("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")], None),
    ],
)
def test_address_of_the_first_host_for_the_others(seen, address):
    answers = [{"address": server, "client": client} for server, client in seen]
    assert rendezvous_address(answers) == address
