"""The ranks and hosts that differ from the others are named, and only those."""

import re

import pytest

from moa_dist.doctor import compare
from moa_dist.doctor.compare import RankReport, clocks, name_ranks, others_findings, versions
from moa_dist.doctor.finding import Finding
from moa_dist.doctor.probes import partner_steps

HOSTS = ["a", "a", "b", "b"]


def reports(*changes, findings=((), (), (), ())):
    """Reports of four ranks on two hosts; `changes` are (rank, fact, value)."""
    facts = [{"code": "12ab", "torch": "2.11.0", "driver": "570.1"} for _ in HOSTS]
    for rank, name, value in changes:
        facts[rank][name] = value
    return [RankReport(*parts) for parts in zip(HOSTS, facts, findings, strict=True)]


def numbers(finding):
    return re.findall(r"\d[\w.]*", finding.text.partition(": ")[2])


def test_equal_ranks_are_one_ok():
    (finding,) = versions(reports())
    assert finding.status == "ok"
    assert re.findall(r"\d+", finding.text) == ["3", "4", "2"]  # versions, ranks, hosts


def test_a_wrong_package_version_names_rank_and_host():
    (finding,) = versions(reports((2, "torch", "2.12.0")))
    assert finding.is_fault
    assert finding.text.startswith("rank 2 (host b): torch ")
    assert (finding.subject, finding.ranks, finding.hosts) == ("torch", (2,), ("b",))
    assert numbers(finding) == ["2.12.0", "2.11.0", "3"]
    assert finding.remedy


def test_every_difference_is_reported():
    changes = [(1, "code", "34cd"), (2, "driver", "535"), (3, "driver", "535")]
    found = list(versions(reports(*changes)))
    assert [(f.subject, f.ranks, f.hosts, numbers(f)) for f in found] == [
        ("code", (1,), ("a",), ["34cd", "12ab", "3"]),
        ("driver", (2, 3), ("b",), ["535", "570.1", "2"]),
    ]


def test_a_fact_that_one_rank_lacks_is_a_difference():
    without = reports()
    del without[3].facts["driver"]
    (finding,) = versions(without)
    assert (finding.subject, finding.ranks, finding.hosts) == ("driver", (3,), ("b",))
    assert numbers(finding) == ["570.1", "3"]


def test_findings_of_other_ranks_are_merged_and_those_of_rank_0_not_repeated():
    same = Finding("gpu", "note", "no NVML")
    fault = Finding("data", "FAULT", "no such folder", "mount it")
    ok = Finding("disk", "ok", "10 GiB free")
    given = reports(findings=([same], [same, ok], [same, fault], [fault]))
    (finding,) = others_findings(given)
    assert finding.text == "ranks 2-3 (host b): no such folder"
    assert (finding.check, finding.status, finding.remedy) == ("data", "FAULT", "mount it")
    assert (finding.ranks, finding.hosts) == ((2, 3), ("b",))


def test_a_wrong_clock_is_named_by_host():
    (finding,) = clocks([0.0, 0.001, -90.2, -90.1], HOSTS)
    assert finding.is_fault
    assert (finding.ranks, finding.hosts) == ((2, 3), ("b",))
    assert numbers(finding) == ["90.2", "0"]  # seconds, and the rank that it is compared with
    (finding,) = clocks([0.0, 0.001, 0.2, -0.3], HOSTS)
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1, 0.9, 10.0], 3),
        ([1.0, 10.0], 1),
        ([10.0, 1.0], 0),
        ([1.0, 1.1, 0.9, 1.4], None),
        ([1.0], None),
    ],
)
def test_the_slow_rank_is_named(seconds, slow):
    (finding,) = compare.speed("matmul", seconds, HOSTS, coupled=False)
    assert finding.is_fault == (slow is not None)
    assert finding.ranks == (() if slow is None else (slow,))
    assert slow is None or f"rank {slow} (host {HOSTS[slow]})" in finding.text
    assert finding.seconds == tuple(seconds)


def test_coupled_ranks_are_never_called_slow():
    (finding,) = compare.speed("all-reduce", [1.0, 10.0], HOSTS, coupled=True)
    assert finding.status == "ok"


def test_ranks_are_named_by_ranges_and_hosts():
    hosts = ["a"] * 4 + ["b"] * 4
    assert name_ranks([0, 2, 3, 5], hosts) == "ranks 0, 2-3 (host a) and rank 5 (host b)"


def test_partners_are_on_other_hosts_if_there_are_several():
    assert partner_steps(["a"] * 4) == [1, 2, 3]
    assert partner_steps(["a", "a", "b", "b", "c", "c"]) == [2, 4]
    assert partner_steps(["a"]) == []
    assert len(partner_steps(["a"] * 64)) == 4
