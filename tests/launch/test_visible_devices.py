"""The list of GPUs in CUDA_VISIBLE_DEVICES: honored, or refused before anything starts."""

import json
import sys

import pytest

from moa_dist.errors import ClusterError
from moa_dist.launch.local import LocalJob
from moa_dist.launch.record import read_records
from moa_dist.launch.visible_devices import ranks_on_visible_devices

WAIT_S = 120
REPORT = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
json.dump({name: os.environ.get(name) for name in names}, sys.stdout)
"""


@pytest.mark.parametrize(
    ("given", "asked", "ranks"),
    [
        (None, None, None),
        (None, 4, 4),
        ("2,3", None, 2),
        ("2,3", 2, 2),
        ("2,3", 1, 1),
        ("GPU-5a, MIG-7b", None, 2),
        ("3,-1,2", None, 1),
        ("", None, 1),
        ("-1", 4, 4),
    ],
)
def test_one_rank_is_started_per_listed_gpu(given, asked, ranks):
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert ranks_on_visible_devices(environment, asked, present=8) == ranks


@pytest.mark.parametrize(
    ("given", "asked", "present"),
    [("2,3", 3, 8), ("2,3", None, 3), ("2,2", None, 8), ("2,,3", None, 8), ("all", None, 8)],
)
def test_impossible_list_is_refused(given, asked, present):
    with pytest.raises(ClusterError, match=f"CUDA_VISIBLE_DEVICES={given}"):
        ranks_on_visible_devices({"CUDA_VISIBLE_DEVICES": given}, asked, present)


def test_ranks_keep_the_list_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    job = LocalJob(tmp_path, [sys.executable, "-c", REPORT], 2)
    try:
        assert job.wait(WAIT_S), (tmp_path / "launcher.log").read_text()
    finally:
        job.end()
    records = read_records(tmp_path)
    assert [record.status for record in records] == [0, 0]
    seen = [json.loads((tmp_path / record.log).read_text()) for record in records]
    assert seen == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": "2,3"}
        for rank in range(2)
    ]
