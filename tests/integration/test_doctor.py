"""The real command on ranks that a launcher starts; one of them has another package."""

import json
import socket

from tests.integration.test_commands import free_port, run

FAKE = "Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n"
RANK = """
if [ "$RANK" = 1 ]; then export PYTHONPATH="$PWD/other:$PYTHONPATH"; fi
exec moa-dist doctor --json > report-$RANK.json
"""


def test_a_rank_with_another_package_is_named(tmp_path):
    info = tmp_path / "other/numpy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(FAKE)
    run(
        "torchrun", "--no-python", "--nproc-per-node", "2", "--master-port", free_port(),
        "bash", "-c", RANK, cwd=tmp_path, expect=1,
    )  # fmt: skip
    findings = json.loads((tmp_path / "report-0.json").read_text())["findings"]
    assert not (tmp_path / "report-1.json").read_text()  # rank 0 speaks for all
    named = f"rank 1 (host {socket.gethostname()}): numpy 1.0"
    (other,) = [f for f in findings if f["check"] == "versions"]
    assert other["status"] == "FAULT"
    assert other["text"].startswith(named)
    assert any(f["text"].startswith(named) for f in findings if f["check"] != "versions")
    times = {f["check"]: f["seconds"] for f in findings if f["seconds"]}
    assert set(times) == {"matmul", "exchange", "all-to-all", "all-reduce"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())
    # A busy machine may make a rank slow, but no result is wrong.
    wrong = {f["check"] for f in findings if f["status"] == "FAULT" and not f["seconds"]}
    assert not set(times) & wrong
