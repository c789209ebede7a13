"""Trackers have each point once, also after a resume or a rewind, and never stop training."""

import json
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from moa_dist.errors import ConfigError
from moa_dist.observe import Observers, tracker
from moa_dist.observe.metrics import PartNorms
from moa_dist.observe.scalars import TOKENS, step_values, validation_values
from moa_dist.observe.tracker import Point, Tracker, missing_packages
from moa_dist.train.check_run import check_run
from tests.observe.reports import make_config, sample_metrics, step_metrics, validation_metrics
from tests.observe.wandb_files import history


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let a busy machine take its time to close."""
    monkeypatch.setattr(tracker, "_CLOSING_S", 120.0)


class InMemory:
    """A store whose server is away for the first `failures` calls."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.calls = failures, []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def _call(self, *call):
        self.may_go_on.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no such server")
        self.calls.append(call)
        return iter(())

    def open(self, run):
        return self._call("open", run.first_step)

    def log(self, point: Point):
        self._call("log", point.step, point.values)

    def log_samples(self, metrics):
        self._call("samples", metrics.step, metrics.samples)

    def rewind(self, step):
        return self._call("rewind", step)

    def close(self):
        self._call("close")


def follow(observer, run, *steps):
    observer.start(run)
    for step in steps:
        observer.step(step_metrics(step))
    observer.validation(validation_metrics(steps[-1]))
    observer.close()


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_tracker_gets_everything_in_order_however_late(run_start, failures):
    store, run = InMemory(failures), run_start()
    following = Tracker("memory", store)
    follow(following, run, 10, 20)
    assert store.calls == [
        ("open", 0),
        ("log", 10, step_values(run, step_metrics(10))),
        ("log", 20, step_values(run, step_metrics(20))),
        ("log", 20, validation_values(validation_metrics(20))),
        ("close",),
    ]
    notes = list(following.take_notes())
    assert len(notes) == (failures > 0)
    assert all("no such server" in note for note in notes)


def test_a_server_that_hangs_delays_nothing(run_start, monkeypatch):
    monkeypatch.setattr(tracker, "_CLOSING_S", 0.01)
    store = InMemory()
    store.may_go_on.clear()
    following = Tracker("memory", store)
    follow(following, run_start(), 10)
    assert len(list(following.take_notes())) == 1
    store.may_go_on.set()


def test_closing_before_the_start_does_nothing():
    Tracker("memory", InMemory()).close()


def test_every_record_has_tokens_and_parts_are_named(run_start):
    parts = {"routers": PartNorms(0.5, 1e-3)}
    values = step_values(run_start(), step_metrics(20, parts=parts))
    assert values["optimizer/grad_norm_of_part/routers"] == 0.5
    assert values["optimizer/update_ratio/routers"] == 1e-3
    assert values[TOKENS] == validation_values(validation_metrics(20))[TOKENS] == 20 * 16 * 64


def test_a_missing_package_is_found_before_ranks_meet(monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    assert [p.keys for p in missing_packages(("tensorboard", "wandb"))] == [("logging.trackers",)]
    with pytest.raises(ConfigError, match=r"moa-dist\[mlflow\]"):
        check_run(make_config(logging={"trackers": ["mlflow"]}), 2)


def wandb_tracker() -> Tracker:
    from moa_dist.observe.wandb import Wandb

    return Tracker("wandb", Wandb())


def mlflow_tracker() -> Tracker:
    from moa_dist.observe.mlflow import Mlflow

    return Tracker("MLflow", Mlflow())


@pytest.fixture
def wandb_run(run_start, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb`").teardown()  # it remembers the mode
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(logging={"trackers": ["wandb"], "project": "ours", "tags": ["a", "b"]})

    def make(**changes):
        run = run_start(config=config, **changes)
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        return run

    return make


def written(run) -> list[dict[int, dict[str, float]]]:
    """Values of all runs in wandb, once its process, which finishes writing by itself, is gone."""
    import wandb

    wandb.teardown()
    return list(history(Path(run.folder)).values())


def only_run(run) -> dict[int, dict[str, float]]:
    (points,) = written(run)
    return points


def test_wandb_goes_on_after_a_resume_without_later_points(wandb_run):
    follow(wandb_tracker(), wandb_run(), 10, 20, 30)
    run = wandb_run(first_step=20)
    follow(wandb_tracker(), run, 30, 40)
    points = only_run(run)
    assert list(points) == [10, 20, 30, 40]
    assert "loss/validation" not in points[30]
    expected = step_values(run, step_metrics(40)) | validation_values(validation_metrics(40))
    assert points[40] == expected
    follow(wandb_tracker(), wandb_run(first_step=40), 50)
    assert list(only_run(run)) == [10, 20, 30, 40, 50]


def test_a_copied_folder_is_another_run(wandb_run, run_start):
    run = wandb_run()
    follow(wandb_tracker(), run, 10)
    copy = make_config(name="copy", logging={"trackers": ["wandb"]})
    follow(wandb_tracker(), run_start(config=copy, first_step=10), 20)
    assert [list(points) for points in written(run)] == [[10], [20]]


def test_wandb_keeps_samples_as_tables(wandb_run):
    run, following = wandb_run(), wandb_tracker()
    following.start(run)
    following.step(step_metrics(10))
    following.samples(sample_metrics(10))
    following.close()
    assert list(only_run(run)) == [10]
    (file,) = Path(run.folder).rglob("samples_*.table.json")
    rows = json.loads(file.read_text())["data"]
    assert [tuple(row) for row in rows] == sample_metrics(10).samples


def test_wandb_discards_what_is_rewound(wandb_run):
    run, following = wandb_run(), wandb_tracker()
    following.start(run)
    following.step(step_metrics(10))
    following.step(step_metrics(20))
    following.rewind(10)
    following.step(step_metrics(30))
    following.close()
    assert {step: values["loss/train"] for step, values in only_run(run).items()} == {
        step: step_metrics(step).loss for step in (10, 30)
    }


def test_wandb_goes_on_as_another_run_where_a_server_cannot_rewind(wandb_run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    asked = []

    def init(self, mode, how):
        asked.append(how)
        if "resume_from" in how:
            raise RuntimeError("rewinding is not enabled")
        return Mock(id=how["id"])

    monkeypatch.setattr("moa_dist.observe.wandb.Wandb._init", init)
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("wandb.teardown", lambda: None)
    follow(wandb_tracker(), wandb_run(), 10, 20)
    following = wandb_tracker()
    follow(following, wandb_run(first_step=10), 20)
    (note,) = following.take_notes()
    first, refused, other = asked
    assert refused == {"resume_from": f"{first['id']}?_step=10"}
    assert other["id"] != first["id"]
    assert other["id"] in note


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_wandb_without_a_server_writes_to_the_folder(wandb_run, monkeypatch, key):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setattr("moa_dist.observe.wandb._INIT_S", 1.0)
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)
    run, following = wandb_run(), wandb_tracker()
    follow(following, run, 10)
    (note,) = following.take_notes()
    assert "wandb sync" in note
    assert ("WANDB_API_KEY" in note) == (key is None)
    assert list(only_run(run)) == [10]


@pytest.fixture
def mlflow_run(run_start, monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="the extra `mlflow`")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    config = make_config(logging={"trackers": ["mlflow"], "project": "ours", "tags": ["a"]})
    return lambda **changes: run_start(config=config, **changes)


def mlflow_points(name: str) -> tuple[dict[int, float], dict[str, str], dict[str, str]]:
    """Values of the only run that is not deleted, with its tags and parameters."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    points = client.get_metric_history(run.info.run_id, name)
    assert len({p.step for p in points}) == len(points)
    return {p.step: p.value for p in points}, run.data.tags, run.data.params


def test_mlflow_goes_on_after_a_resume_without_later_points(mlflow_run):
    follow(mlflow_tracker(), mlflow_run(), 10, 20, 30)
    follow(mlflow_tracker(), mlflow_run(first_step=20), 30, 40)
    losses, tags, params = mlflow_points("loss/train")
    assert losses == {step: step_metrics(step).loss for step in (10, 20, 30, 40)}
    assert mlflow_points("loss/validation")[0] == {40: validation_metrics(40).loss}
    assert (tags["a"], params["model.d_model"]) == ("true", "16")


def test_mlflow_discards_what_is_rewound(mlflow_run):
    following = mlflow_tracker()
    following.start(mlflow_run())
    following.step(step_metrics(10))
    following.step(step_metrics(20))
    following.rewind(10)
    following.step(step_metrics(30))
    following.close()
    losses, *_ = mlflow_points("loss/train")
    assert losses == {step: step_metrics(step).loss for step in (10, 30)}


def test_mlflow_keeps_samples_up_to_where_it_is_rewound(mlflow_run):
    following = mlflow_tracker()
    following.start(mlflow_run())
    for step in (10, 20):
        following.step(step_metrics(step))
        following.samples(sample_metrics(step))
    following.rewind(10)
    following.close()
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    (file,) = client.list_artifacts(run.info.run_id, "samples")
    written = Path(client.download_artifacts(run.info.run_id, file.path)).read_text()
    assert [tuple(sample.values()) for sample in json.loads(written)] == sample_metrics(10).samples
    assert "10" in file.path


def test_mlflow_without_an_address_is_one_note(mlflow_run, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    observers = Observers(mlflow_run().config)
    follow(observers, mlflow_run(), 10, 20)
    assert capsys.readouterr().out.count("MLFLOW_TRACKING_URI") == 1
