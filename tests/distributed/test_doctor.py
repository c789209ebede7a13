"""A rank that is slow, computes wrongly or differs is found among real ranks, and no other.

Planted slowness is a hundred times what the work takes; a busy machine changes nothing about it.
"""

import socket
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moa_dist.distributed.start import DistContext
from moa_dist.doctor import rank_checks
from moa_dist.doctor.finding import Finding
from moa_dist.doctor.probes import all_probes
from moa_dist.doctor.rank_checks import check_ranks, clock_offsets, gather, judge, measure

CPU = torch.device("cpu")
HOST = socket.gethostname()


def planted(name, rank, spoil):
    """Findings if `rank` does the work called `name` through `spoil`, and the others as it is."""
    hosts = gather(HOST)
    probes = [
        replace(probe, run=lambda run=probe.run: spoil(run))
        if probe.name == name and dist.get_rank() == rank
        else probe
        for probe in all_probes(CPU, hosts)
    ]
    return list(judge(gather(measure(probes, CPU, rounds=3)), hosts))


def slowly(run):
    time.sleep(0.5)
    return run()


def wrongly(run):
    result = run()
    result.view(-1)[5] += 1
    return result


def not_at_all(run):
    raise RuntimeError("out of memory")


def faults(by_rank, check):
    """Faults of `check`, which every rank must know alike."""
    by_rank = [[f for f in found if f.is_fault and f.check == check] for found in by_rank]
    assert all(own == by_rank[0] for own in by_rank)
    return by_rank[0]


def assert_slow(by_rank, check, rank):
    """The fault names `rank`, whose own time stands out: it has slowed nobody else's."""
    (finding,) = (f for f in by_rank[0] if f.check == check)
    others = [seconds for other, seconds in enumerate(finding.seconds) if other != rank]
    assert finding.is_fault
    assert rank in finding.ranks  # a busy machine may make another one slow as well
    assert finding.seconds[rank] > 0.49 > max(others)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_slow_rank_is_named_by_its_own_time(pools, world_size):
    assert_slow(pools(world_size).run(planted, "matmul", 1, slowly), "matmul", 1)


def test_a_slow_link_is_named_by_its_best_partner(pools):
    assert_slow(pools(4).run(planted, "exchange", 2, slowly), "exchange", 2)


@pytest.mark.parametrize("name", ["matmul", "exchange", "all-to-all", "all-reduce"])
def test_a_wrong_result_names_its_rank(pools, name):
    found = pools(2).run(planted, name, 1, wrongly)
    (wrong,) = (fault for fault in faults(found, name) if not fault.seconds)  # not about speed
    assert wrong.text.startswith(f"rank 1 (host {HOST}): ")


def test_right_results_are_not_called_wrong(pools):
    found = pools(4).run(planted, "", 0, slowly)
    assert len(found[0]) == 4
    assert all(finding.seconds for finding in found[0])  # nothing but speed


def test_work_that_fails_on_one_rank_holds_no_other_up(pools):
    found = pools(2).run(planted, "matmul", 1, not_at_all)
    (fault,) = faults(found, "matmul")
    assert fault.text.startswith(f"rank 1 (host {HOST}): ")
    assert fault.text.endswith("RuntimeError: out of memory")


def check_with_another_version(rank):
    """The whole check, where `rank` has another numpy and a fault of its own."""
    own = []
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            own = [Finding("data", "FAULT", "no such folder")]
            versions = rank_checks.package_versions() | {"numpy": "1.0"}
            patch.setattr(rank_checks, "package_versions", lambda: versions)
        context = DistContext(dist.get_rank(), dist.get_world_size(), CPU, "gloo")
        return list(check_ranks(context, own))


def test_a_wrong_version_and_a_rank_s_own_fault_are_named(pools):
    found = pools(2).run(check_with_another_version, 1)
    (fault,) = faults(found, "versions")
    assert fault.text.startswith(f"rank 1 (host {HOST}): numpy 1.0")
    assert [f.text for f in faults(found, "data")] == [f"rank 1 (host {HOST}): no such folder"]
    assert [f.check for f in found[0] if f.status == "note"] == ["gpu"]  # said once


def offsets_with_wrong_clock(rank, seconds):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            now = time.time
            patch.setattr(time, "time", lambda: now() + seconds)
        return clock_offsets()


def test_a_wrong_clock_is_measured(pools):
    for offsets in pools(2).run(offsets_with_wrong_clock, 1, 3600.0):
        assert offsets[0] == 0
        assert offsets[1] == pytest.approx(3600, abs=60)
