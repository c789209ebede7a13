"""The top of a page: how far the run is, what it ran on, and what needs a person's attention."""

import json

import pytest

from moa_dist.observe.jsonl import FILE_NAME
from moa_dist.observe.metrics import Timing
from moa_dist.report.health import warnings
from moa_dist.report.numbers import Number, headline, hosts, software
from moa_dist.report.progress import progress, state
from moa_dist.report.read import Run, read_run
from tests.report.outline import NOW, outline


def rewrite(folder, change) -> Run:
    """Apply `change` to every record of the run's metrics, and read the run."""
    records = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    for record in records:
        change(record)
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    return read_run(folder)


def timed(folder, began: float = NOW - 200.0, seconds: float = 10.0) -> Run:
    """Let the run begin at `began`, and take so many seconds per step."""

    def change(record):
        record["time"] = began + seconds * record["step"]

    return rewrite(folder, change)


def number_of(run: Run, label: str) -> Number:
    return next(number for number in headline(run) if number.label == label)


def test_tokens_time_and_what_is_left(write_run):
    folder = write_run()
    so_far = progress(timed(folder))
    assert (so_far.step, so_far.total) == (20, 650)
    assert so_far.tokens == 20 * 16 * 64  # as many samples as were read, of 64 tokens
    assert so_far.total_tokens == so_far.tokens + 630 * 32 * 64  # then of the configured size
    assert so_far.seconds == pytest.approx(200)
    assert so_far.remaining == pytest.approx(630 * 10)
    found = outline(folder)
    assert found.values("max") == ["650"]
    assert found.values("value") == ["20"]
    rows = [found.texts("name"), found.texts("mid")]
    assert rows[0][:4] == ["nats per token", "step", "tokens", "time"]
    assert {"10", "10.2k", "1m40s"} <= set(rows[1])


def test_time_between_attempts_does_not_count(write_run):
    folder = write_run()
    timed(folder)
    lines = (folder / FILE_NAME).read_text().splitlines()
    late = [json.loads(line) for line in lines]
    first = next(i for i, record in enumerate(late) if record["step"] > 10)
    for record in late[first:]:
        record["time"] += 5000
    start = late[0] | {"step": 10, "time": late[first - 1]["time"] + 5000}
    records = [*late[:first], start, *late[first:]]
    (folder / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(folder)
    assert run.starts == [0, 10]
    assert progress(run).seconds == pytest.approx(200)


def test_times_that_were_not_recorded(write_run):
    folder = write_run()
    run = rewrite(folder, lambda record: record.pop("time"))
    assert progress(run).seconds is progress(run).remaining is None
    assert state(run, NOW) == ("not done", False)
    assert progress(run).tokens == 20 * 16 * 64
    assert "tokens" in outline(folder).texts("name")
    assert "time" not in outline(folder).texts("name")


@pytest.mark.parametrize(
    ("age", "attempt", "word", "is_bad"),
    [
        (30.0, None, "running", False),
        (4000.0, None, "silent", True),
        (30.0, {"seconds": 201, "cause": "preempted", "restarts": False}, "stopped", True),
        (30.0, {"seconds": 201, "cause": "killed", "restarts": True}, "running", False),
        (30.0, {"seconds": 50, "cause": "earlier", "restarts": False}, "running", False),
        (30.0, {"seconds": "?", "cause": None}, "running", False),
    ],
)  # fmt: skip
def test_whether_a_run_still_reports(write_run, age, attempt, word, is_bad):
    folder = write_run()
    if attempt:
        attempt["began"] = "2033-05-18T03:30:00+00:00"  # 200 s before NOW
        (folder / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    run = timed(folder)
    text, bad = state(run, NOW + age)
    assert (text.split()[0].rstrip(",:"), bad) == (word, is_bad)
    assert any(word in warning for warning in warnings(run, NOW + age)) == is_bad


def test_a_run_that_is_done_is_not_silent(write_run):
    folder = write_run(steps=range(630, 651))
    assert state(timed(folder), NOW + 1e6) == ("done", False)
    assert "chip good" in outline(folder).values("class")


def test_hosts_and_commit(write_run):
    folder, commit = write_run(), "0123456789abcdef0123456789abcdef01234567"

    def change(record):
        if record["kind"] == "start":
            record["provenance"]["commit"] = commit + "+changes"

    run = rewrite(folder, change)
    assert "node-1" in hosts(run)
    assert "node-2" in hosts(run)
    assert commit[:12] + "+changes" in software(run)
    assert hosts(run) in outline(folder).text
    assert software(run) in outline(folder).text
    run.facts["hosts"] = {f"node-{i}": 8 for i in range(1000)}
    assert "1,000" in hosts(run)
    assert len(hosts(run)) < 200
    run.facts |= {"hosts": [], "provenance": None}
    assert hosts(run) == software(run) == ""


def test_dead_experts_are_counted_of_all_and_marked(write_run):
    folder = write_run()
    run, found = read_run(folder), outline(folder)
    number = number_of(run, "Dead experts")
    assert (number.text, number.warns) == ("2 of 8", True)  # 4 experts, applied twice
    assert found.values("class").count("tile warn") == 1
    assert any("2 of 8" in warning for warning in warnings(run, NOW))

    def revive(record):
        for summary in record.get("routing", {}).values():
            summary["dead_experts"] = 0.0

    run = rewrite(folder, revive)
    number = number_of(run, "Dead experts")
    assert (number.text, number.warns) == ("0 of 8", False)
    assert "tile warn" not in outline(folder).values("class")


def spoil_loss(record):
    if record["kind"] == "step" and record["step"] == 25:
        record["loss"] = None


def raise_loss(record):
    if record["kind"] == "step" and record["step"] > 25:
        record["loss"] = 9.0


def raise_validation(record):
    if record["kind"] == "validation":
        record["loss"] = 4.0 if record["step"] == 10 else 4.2


def collapse(record):
    if record["kind"] == "start":
        record["routers"]["ffn"] = {"groups": 1, "experts": 32, "choices": 2}
    for summary in record.get("routing", {}).values():
        summary["load_imbalance"] = 16.0


def look_ahead(record):
    if record["kind"] == "start":
        record["looks_ahead"] = "tokens see later ones"


def slow_down(record):
    if record["kind"] == "step" and record["step"] > 28:
        record["tokens_per_second"] = 100.0


def hold_up(record):
    if record["kind"] == "step":
        record["slowest"] = {"rank": 5, "host": "node-5", "seconds": 3.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil_loss, ("1 of 40", "step 25")),
        (raise_loss, ("training loss", "9")),
        (raise_validation, ("validation loss", "step 10", "4.2")),
        (collapse, ("ffn", "16.0 x")),
        (look_ahead, ("do not compare", "tokens see later ones")),
        (slow_down, ("Tokens per second", "1%")),
        (hold_up, ("rank 5 (node-5)",)),
    ],
)
def test_what_needs_attention(write_run, change, words):
    folder = write_run(steps=range(1, 41))

    before = warnings(read_run(folder), NOW)
    after = warnings(rewrite(folder, change), NOW)
    assert not [text for text in before if all(word in text for word in words)]
    assert [text for text in after if all(word in text for word in words)]
    found = outline(folder)
    assert all(text in found.text for text in after)


def test_a_healthy_run_needs_none(write_run):
    folder = write_run(routing={}, timing=Timing.of([0.5, 0.5], [0.1, 0.1], ["a", "b"]))
    assert warnings(timed(folder), NOW) == []
    assert "card good attention" not in outline(write_run("silent")).values("class")
    (folder / "attempts.jsonl").write_text('{"restarts": true, "cause": "rank 1 was killed"}\n')
    assert any("rank 1 was killed" in text for text in warnings(read_run(folder), NOW))
