"""The rank and host that differ from the others are named, and only those."""

import pytest

from moa_dist.doctor import compare
from moa_dist.doctor.compare import RankReport, alike, clocks, name_ranks, others_findings
from moa_dist.doctor.finding import Finding
from moa_dist.doctor.probes import partner_steps

HOSTS = ["a", "a", "b", "b"]


def reports(*changes, findings=((), (), (), ())):
    """Of four ranks on two hosts; `changes` are (rank, fact, value)."""
    facts = [{"code": "12ab", "torch": "2.11.0", "driver": "570.1"} for _ in HOSTS]
    for rank, name, value in changes:
        facts[rank][name] = value
    return [RankReport(*parts) for parts in zip(HOSTS, facts, findings, strict=True)]


def test_like_ranks_are_one_ok():
    (finding,) = alike(reports())
    assert finding.status == "ok"
    assert "3 versions" in finding.text
    assert "4 ranks on 2 hosts" in finding.text


def test_a_wrong_package_version_names_rank_and_host():
    (finding,) = alike(reports((2, "torch", "2.12.0")))
    assert finding.is_fault
    assert finding.text == "rank 2 (host b): torch 2.12.0, but 2.11.0 on 3 others"
    assert "install the same" in finding.remedy


def test_every_difference_is_told():
    found = list(alike(reports((1, "code", "34cd"), (2, "driver", "535"), (3, "driver", "535"))))
    assert [f.text for f in found] == [
        "rank 1 (host a): code 34cd, but 12ab on 3 others",
        "ranks 2-3 (host b): driver 535, but 570.1 on 2 others",
    ]


def test_a_fact_that_one_rank_lacks_is_a_difference():
    without = reports()
    del without[3].facts["driver"]
    (finding,) = alike(without)
    assert finding.text == "rank 3 (host b): driver unknown, but 570.1 on 3 others"


def test_others_say_their_faults_and_notes_once_and_what_rank_0_said_is_not_repeated():
    same = Finding("gpu", "note", "no NVML")
    fault = Finding("data", "FAULT", "no such folder", "mount it")
    ok = Finding("disk", "ok", "10 GiB free")
    given = reports(findings=([same], [same, ok], [same, fault], [fault]))
    (finding,) = others_findings(given)
    assert finding.text == "ranks 2-3 (host b): no such folder"
    assert (finding.check, finding.status, finding.remedy) == ("data", "FAULT", "mount it")


def test_a_wrong_clock_is_named_by_host():
    (finding,) = clocks([0.0, 0.001, -90.2, -90.1], HOSTS)
    assert finding.is_fault
    assert finding.text == "ranks 2-3 (host b): 90.2 s behind rank 0"
    (finding,) = clocks([0.0, 0.001, 0.2, -0.3], HOSTS)
    assert finding.status == "ok"


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1, 0.9, 10.0], "rank 3 (host b)"),
        ([1.0, 10.0], "rank 1 (host a)"),
        ([10.0, 1.0], "rank 0 (host a)"),
        ([1.0, 1.1, 0.9, 1.4], None),
        ([1.0], None),
    ],
)
def test_the_slow_rank_is_named(seconds, slow):
    (finding,) = compare.speed("matmul", seconds, HOSTS, coupled=False)
    assert finding.is_fault == (slow is not None)
    assert slow is None or f"slow: {slow}" in finding.text
    assert finding.seconds == tuple(seconds)


def test_of_coupled_ranks_none_is_called_slow():
    (finding,) = compare.speed("all-reduce", [1.0, 10.0], HOSTS, coupled=True)
    assert finding.status == "ok"


def test_ranks_are_named_by_runs_and_hosts():
    hosts = ["a"] * 4 + ["b"] * 4
    assert name_ranks([0, 2, 3, 5], hosts) == "ranks 0, 2-3 (host a) and rank 5 (host b)"


def test_partners_are_on_other_hosts_where_there_are_some():
    assert partner_steps(["a"] * 4) == [1, 2, 3]
    assert partner_steps(["a", "a", "b", "b", "c", "c"]) == [2, 4]
    assert partner_steps(["a"]) == []
    assert len(partner_steps(["a"] * 64)) == 4
