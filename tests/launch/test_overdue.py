"""Ranks that wait for one that failed before all had joined are ended."""

from moa_dist.launch.overdue import Overdue
from moa_dist.launch.record import RankRecord, write_record


def test_others_get_time_to_notice_a_failure_by_themselves(tmp_path):
    write_record(tmp_path, RankRecord(0, "a", 1))
    write_record(tmp_path, RankRecord(1, "b", 2, status=0))
    eager = Overdue(tmp_path, grace_s=0.0, poll_s=0.0)
    patient = Overdue(tmp_path, grace_s=1000.0, poll_s=0.0)
    assert eager.problem() is None
    write_record(tmp_path, RankRecord(1, "b", 2, status=2))
    assert "rank 1 " in (eager.problem() or "")
    assert patient.problem() is None
