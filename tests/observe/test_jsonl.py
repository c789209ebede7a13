"""The metrics file loses no bit, and after a resume it reads like one uninterrupted run."""

import errno
import json
import math
import resource
from math import nan
from pathlib import Path

import pytest

from moa_dist.config.recursion import ExpertChoiceConfig
from moa_dist.errors import DataError
from moa_dist.observe.jsonl import FILE_NAME, MetricsFile, read_metrics
from moa_dist.observe.metrics import PartNorms
from moa_dist.provenance import Provenance
from tests.observe.reports import step_metrics, validation_metrics


def write(run, *steps, validate=()):
    file = MetricsFile()
    file.start(run)
    for step in steps:
        file.step(step_metrics(step))
        if step in validate:
            file.validation(validation_metrics(step))
            file.note(f"saved step {step}")
    file.close()
    return Path(run.folder) / FILE_NAME


def test_a_line_that_a_full_disk_cuts_short_is_removed(run_start):
    file = MetricsFile()
    run = run_start()
    file.start(run)
    path = Path(run.folder) / FILE_NAME
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match=FILE_NAME) as error:
            file.step(step_metrics(1))
        assert error.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.step(step_metrics(2))
    file.close()
    assert outline(path) == [("start", 0), ("step", 2)]


def outline(path):
    return [(record["kind"], record["step"]) for record in read_metrics(path)]


def test_norms_of_parts_and_tokens(run_start):
    file, run = MetricsFile(), run_start()
    file.start(run)
    file.step(step_metrics(7, parts={"dense": PartNorms(0.5, 1e-3), "routers": PartNorms(1, nan)}))
    file.validation(validation_metrics(7))
    file.close()
    _, step, validation = read_metrics(Path(run.folder) / FILE_NAME)
    assert step["parts"] == {
        "dense": {"grad_norm": 0.5, "update_ratio": 1e-3},
        "routers": {"grad_norm": 1, "update_ratio": None},
    }
    assert step["tokens_read"] == validation["tokens_read"] == 7 * 16 * 64


def test_round_trip_keeps_every_bit(run_start):
    run = run_start()
    start, step, validation, note = read_metrics(write(run, 7, validate=[7]))
    assert start["kind"] == "start"
    assert start["config"] == run.config.model_dump(mode="json")
    assert start["num_parameters"] == run.num_parameters
    assert Provenance(**start["provenance"]) == run.provenance
    wanted = step_metrics(7)
    assert (step["loss"], step["lr"]) == (wanted.loss, wanted.lr)
    assert step["aux_losses"] == wanted.aux_losses
    assert step["tokens_per_second"] == wanted.tokens_per_second
    assert step["routing"]["layer0.repeat0.ffn"] == {
        "drop_share": 0.3,
        "experts_per_token": 2.0,
        "entropy": math.log(2),
        "load_imbalance": 2.4,
        "dead_experts": 2.0,
    }
    assert step["communication_share"] == pytest.approx(1 / 3)
    assert step["slowest"] == {"rank": 0, "host": "node-1", "seconds": 0.5}
    assert step["fastest"] == {"rank": 1, "host": "node-2", "seconds": 0.3}
    assert validation["perplexity"] == math.exp(4.5)
    assert validation["load"] == {
        "layer0.repeat0.ffn": [[6, 4, 0, 0]],
        "layer0.repeat1.ffn": [[3, 3, 2, 2]],
    }
    assert note.pop("time") >= validation["time"] >= step["time"] >= start["time"] > 1.7e9
    assert note == {"kind": "note", "step": 7, "message": "saved step 7"}


def test_a_start_says_whether_tokens_see_later_ones(run_start):
    config = run_start().config
    recursion = ExpertChoiceConfig(capacity=(1.0, 0.5))
    ahead = config.changed(model=config.model.changed(recursion=recursion))
    assert ahead.model.looks_ahead
    for each in (config, ahead):
        start, _ = read_metrics(write(run_start(config=each), 7))
        assert start["looks_ahead"] == each.model.looks_ahead


def test_resume_drops_later_steps(run_start):
    write(run_start(), 10, 20, 30, validate=[20])
    path = write(run_start(first_step=20), 30, 40)
    assert outline(path) == [
        ("start", 0),
        ("step", 10),
        ("step", 20),
        ("validation", 20),
        ("note", 20),
        ("start", 20),
        ("step", 30),
        ("step", 40),
    ]


def test_resuming_twice_from_one_checkpoint_counts_once(run_start):
    write(run_start(), 10, 20)
    write(run_start(first_step=20), 30)
    path = write(run_start(first_step=20), 30)
    assert outline(path) == [
        ("start", 0),
        ("step", 10),
        ("step", 20),
        ("start", 20),
        ("step", 30),
    ]


def test_a_rollback_drops_later_steps_but_not_the_start(run_start):
    write(run_start(), 10, 20)
    file = MetricsFile()
    file.start(run_start(first_step=20))
    file.step(step_metrics(30))
    file.rewind(20)
    file.note("rolled back")
    file.step(step_metrics(30))
    file.close()
    assert outline(Path(run_start().folder) / FILE_NAME) == [
        ("start", 0),
        ("step", 10),
        ("step", 20),
        ("start", 20),
        ("note", 20),
        ("step", 30),
    ]


def test_a_new_run_begins_a_new_file(run_start):
    write(run_start(), 10, 20)
    assert outline(write(run_start(), 10)) == [("start", 0), ("step", 10)]


def test_a_last_line_cut_short_is_dropped(run_start):
    path = write(run_start(), 10, 20)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:25])
    assert outline(path) == [("start", 0), ("step", 10), ("step", 20)]
    write(run_start(first_step=20), 30)
    assert outline(path)[-2:] == [("start", 20), ("step", 30)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lines_can_be_read_while_training(run_start):
    run = run_start()
    file = MetricsFile()
    file.start(run)
    file.step(step_metrics(1))
    assert outline(Path(run.folder) / FILE_NAME) == [("start", 0), ("step", 1)]
    file.close()


def test_what_is_not_finite_is_null_in_strict_json(run_start):
    file = MetricsFile()
    run = run_start(flops_per_token=math.inf)
    file.start(run)
    file.step(step_metrics(1, loss=math.nan, aux_losses={"z": -math.inf}, grad_norm=math.inf))
    file.close()
    path = Path(run.folder) / FILE_NAME

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    start, step = read_metrics(path)
    assert start["flops_per_token"] is None
    assert (step["loss"], step["aux_losses"], step["grad_norm"]) == (None, {"z": None}, None)
    assert step["lr"] == step_metrics(1).lr


@pytest.mark.parametrize("line", ["{", "1", "{}", '{"kind": "step", "step": "one"}', "\xff"])
def test_a_damaged_line_is_named(run_start, line):
    path = write(run_start(), 10)
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: "):
        list(read_metrics(path))


def test_after_a_rollback_loads_of_discarded_steps_are_forgotten(run_start):
    file = MetricsFile()
    file.start(run_start())
    file.step(step_metrics(10))
    file.rewind(0)
    file.validation(validation_metrics(5))
    file.close()
    *_, validation = read_metrics(Path(run_start().folder) / FILE_NAME)
    assert validation["load"] == {}


def test_closing_before_the_start_does_nothing():
    MetricsFile().close()
