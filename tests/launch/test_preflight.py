"""What preflight makes of the answers of hosts; the hosts are played."""

import time
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.config.run import Config, run_folder
from moa_dist.doctor.host import probe_file
from moa_dist.launch import preflight as module
from moa_dist.launch.checked_host import NoAnswerError
from moa_dist.launch.hostfile import Host
from moa_dist.launch.preflight import Preflight, Wanted, meeting_address, preflight

ROOT = Path(__file__).parents[2]
FACTS = {"code": "c0de", "torch": "2.13.0"}


class Played:
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


def check(config: Config | None, slots=(1, 1), wanted=None, **hosts: Played) -> Preflight:
    wanted = wanted or Wanted(config, "x.yaml" if config else None)
    return preflight(hosts, slots, wanted)


def faults(found: Preflight) -> str:
    return "\n".join(map(str, found.faults))


def test_hosts_that_agree_are_fit_and_told_where_to_meet(config):
    run = run_folder(config)
    found = check(config, a=Played(run), b=Played(run, "10.0.0.2"))
    assert not faults(found)
    assert found.hosts == [Host("a", 1), Host("b", 1)]
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 29500)
    assert not list(run.iterdir())  # what hosts wrote to find each other


def test_ranks_are_counted_by_gpus_where_nobody_said(config):
    run, report = run_folder(config), {"num_gpus": 4}
    hosts = {"a": Played(run, report=report), "b": Played(run, report=report)}
    found = check(config, (None, None), **hosts)
    assert [host.slots for host in found.hosts] == [4, 4]


def test_all_that_is_wrong_is_said_at_once(config):
    run = run_folder(config)
    old = Played(
        run, report={"facts": FACTS | {"torch": "2.12.0"}}, clock={"time": time.time() - 9}
    )
    gone = Played(run, report=NoAnswerError("cannot be reached", "look", unreachable=True))
    stray = Played(None, report={"findings": [["shared folder", "FAULT", "not the same", "mount"]]})
    held = Played(run, listen={"port": None, "problem": "port 29500 cannot be used"})
    said = faults(check(config, (1, 1, 1, 1), a=held, b=old, c=gone, d=stray))
    assert "host b: torch 2.12.0, but 2.13.0 on 2 others" in said
    assert "host c cannot be reached" in said
    assert "-> look" in said
    assert "host d: not the same" in said
    assert "s behind this machine" in said
    assert "port 29500 cannot be used" in said
    assert "--master-port" in said


def test_host_that_wrote_elsewhere_is_named(config, monkeypatch):
    monkeypatch.setattr(module, "_LOOKS_S", 0.0)
    found = check(config, a=Played(run_folder(config)), b=Played(None))
    assert "what host b wrote is not seen here" in faults(found)


def test_batch_arithmetic_is_of_all_hosts_together(config):
    run = run_folder(config)
    found = check(config, (2, 1), a=Played(run), b=Played(run))
    assert "`parallel.expert_parallel` is 2, which does not divide 3 ranks" in faults(found)


def test_other_port_is_taken_and_said(config):
    run = run_folder(config)
    first = Played(run, listen={"port": 17000, "problem": "port 29500 is held by x"})
    found = check(config, a=first, b=Played(run))
    assert not faults(found)
    assert found.master_port == 17000
    assert "held by x; taking 17000" in "\n".join(map(str, found.findings))


def test_unreachable_meeting_point_is_a_fault(config):
    run = run_folder(config)
    far = Played(
        run, reach={"interface": None, "problem": "cannot reach 10.0.0.1:29500: timed out"}
    )
    assert "host b cannot reach 10.0.0.1:29500" in faults(check(config, a=Played(run), b=far))


def test_only_hosts_that_may_come_back_count_as_unreachable(config):
    run = run_folder(config)
    gone = Played(run, report=NoAnswerError("is silent", unreachable=True))
    broken = Played(run, report=NoAnswerError("has no moa_dist"))
    found = check(config, (1, 1, 1), a=Played(run), b=gone, c=broken)
    assert found.unreachable == ["b"]
    assert len(found.faults) >= 2


def test_hosts_alone_are_compared_without_a_configuration():
    found = check(None, a=Played(), b=Played(report={"facts": FACTS | {"code": "other"}}))
    assert "host b: code other, but c0de on the other" in faults(found)


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
    assert meeting_address(answers) == address
