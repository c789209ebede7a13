"""One observer that forwards to all others."""

import errno
from pathlib import Path
from unittest.mock import Mock

import pytest

from moa_dist.observe import Observers
from moa_dist.observe.jsonl import FILE_NAME, MetricsFile, read_metrics
from tests.observe.reports import make_config, sample_metrics, step_metrics, validation_metrics


@pytest.mark.parametrize("tensorboard", [True, False])
def test_all_observers_receive_every_report(run_start, capsys, tensorboard):
    config = make_config(logging={"trackers": ["tensorboard"] if tensorboard else []})
    run = run_start(config=config)
    observers = Observers(config)
    observers.start(run)
    observers.step(step_metrics(1))
    observers.validation(validation_metrics(1))
    observers.samples(sample_metrics(1))
    observers.note("saved step-1")
    observers.close()

    text = capsys.readouterr().out
    assert all(
        word in text for word in ("ep 2", "ETA", "bits per byte", "saved step-1", "ship\\nsails")
    )
    records = list(read_metrics(Path(run.folder) / FILE_NAME))
    kinds = [r["kind"] for r in records]
    assert kinds == ["start", "note", "step", "validation", "samples", "note"]
    written = [(sample["prompt"], sample["text"]) for sample in records[-2]["samples"]]
    assert written == sample_metrics(1).samples
    assert text.count("no GPU telemetry") == 1
    assert any(Path(run.folder).glob("events.*")) == tensorboard


def test_a_full_disk_is_reported_once_and_ends_nothing(run_start, capsys, monkeypatch):
    config = make_config(logging={"trackers": []})
    run = run_start(config=config)
    observers = Observers(config)
    observers.start(run)
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "step", Mock(side_effect=full))
        for step in (1, 2):
            observers.step(step_metrics(step))
    observers.step(step_metrics(3))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "close", Mock(side_effect=full))
        observers.close()
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if MetricsFile.__name__ in line)
    assert f"metrics.jsonl: {full.strerror}" in line
    steps = [r["step"] for r in read_metrics(Path(run.folder) / FILE_NAME) if r["kind"] == "step"]
    assert steps == [3]


def test_nothing_is_opened_before_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    observers = Observers(make_config())
    observers.close()
    assert list(tmp_path.iterdir()) == []
