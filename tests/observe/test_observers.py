"""One observer that tells all others."""

from pathlib import Path

import pytest

from moa_dist.observe import Observers
from moa_dist.observe.jsonl import FILE_NAME, read_metrics
from moa_dist.observe.tensorboard import FOLDER_NAME
from tests.observe.reports import make_config, step_metrics, validation_metrics


@pytest.mark.parametrize("tensorboard", [True, False])
def test_everyone_is_told(run_start, capsys, tensorboard):
    config = make_config(logging={"tensorboard": tensorboard})
    run = run_start(config=config)
    observers = Observers(config)
    observers.start(run)
    observers.step(step_metrics(1))
    observers.validation(validation_metrics(1))
    observers.note("saved step-1")
    observers.close()

    text = capsys.readouterr().out
    assert all(word in text for word in ("ep 2", "ETA", "bits per byte", "saved step-1"))
    kinds = [r["kind"] for r in read_metrics(Path(run.folder) / FILE_NAME)]
    assert kinds == ["start", "note", "step", "validation", "note"]
    assert text.count("no GPU telemetry") == 1
    assert (Path(run.folder) / FOLDER_NAME).exists() == tensorboard


def test_nothing_is_opened_before_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    observers = Observers(make_config())
    observers.close()
    assert list(tmp_path.iterdir()) == []
