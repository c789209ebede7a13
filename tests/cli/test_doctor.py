"""`moa-dist doctor` on one machine: findings and exit status."""

import json
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import yaml

from moa_dist.cli.main import main
from moa_dist.config import load_config, to_yaml
from moa_dist.doctor.configured import check_configuration, checkpoint_bytes
from moa_dist.models.language_model import meta_model
from moa_dist.plan.exchange_choice import expected_states
from tests.evaluate.runs import config


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Not a rank of a job, and with a port of its own."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(listener.getsockname()[1])


@pytest.fixture
def file(made, tmp_path):
    """A configuration of the data in `made`, with an output folder of its own."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config(made).model_copy(update={"output": str(tmp_path / "out")})))
    return str(path)


def doctor(capsys, *arguments):
    status = main(["doctor", *arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    faults = [f for f in result["findings"] if f["status"] == "FAULT"]
    assert result["faults"] == len(faults)
    assert status == (1 if faults else 0)
    return result["findings"], [(f["check"], f["text"]) for f in faults]


def test_a_sound_machine_and_run_have_no_fault(capsys, file, tmp_path):
    findings, faults = doctor(capsys, "--config", file)
    assert faults == []
    assert {f["check"] for f in findings} >= {"port", "package", "layout", "data", "checkpoints"}
    assert not (tmp_path / "out").exists()


def test_text_has_a_line_per_check_and_what_to_do(capsys):
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))) as listener:
        assert main(["doctor"]) == 1
        port = listener.getsockname()[1]
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["FAULT", "port"])
    assert str(port) in lines[at]
    assert lines[at + 1].split()[0] == "->"
    assert lines[-1].split()[0] == "1"


def test_all_faults_of_a_run_are_reported(capsys, file, made, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(made / "data/train", data)
    shard = next(data.glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    (tmp_path / "out").write_text("a file, no folder")
    _, faults = doctor(
        capsys, "--world-size", "3", "--config", file, f"data.train={data}",
        f"output={tmp_path}/out/deeper",
    )  # fmt: skip
    found = {check: " ".join(text for c, text in faults if c == check) for check, _ in faults}
    assert "data.readers" in found["layout"]
    assert shard.name in found["data"]
    assert f"{tmp_path}/out" in found["checkpoints"]


def test_a_wrong_configuration_is_a_finding(capsys, file):
    content = yaml.safe_load(Path(file).read_text())
    content["train"]["stpes"] = 1
    Path(file).write_text(yaml.safe_dump(content))
    findings, faults = doctor(capsys, "--config", file)
    assert [check for check, _ in faults] == ["configuration"]
    assert "stpes" in faults[0][1]
    assert "`steps`" in faults[0][1]
    assert any(f["check"] == "port" for f in findings)


def test_overrides_without_a_configuration_are_refused(capsys):
    assert main(["doctor", "train.steps=1"]) == 2
    assert "`train.steps=1`" in capsys.readouterr().err


def test_a_full_disk_is_seen_before_the_first_checkpoint(file, monkeypatch):
    run = load_config(file, [])
    needed = 3 * checkpoint_bytes(run)  # two are kept while the third is written
    usage = namedtuple("usage", "total used free")
    for free, fault in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        found = {f.check: f for f in check_configuration(run, 1)}
        assert found["checkpoints"].is_fault == fault


def test_host_memory_must_hold_an_offloaded_optimizer(file, monkeypatch):
    run = load_config(file, ["optimizer.offload=host", "parallel.zero_stage=1"])
    held = expected_states(run, 1, meta_model(run.model))
    needed = held.host_total(is_pinned=False)
    memory = namedtuple("memory", "total")
    for total, fault in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: memory(total))
        found = {f.check: f for f in check_configuration(run, 1)}
        assert found["host memory"].is_fault == fault
    without = check_configuration(load_config(file, []), 1)
    assert "host memory" not in {f.check for f in without}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_has_the_predicted_size(made, stage):
    """Up to headers, indices and sums; the saved one is of ZeRO 1."""
    run = config(made)
    parallel = run.parallel.model_copy(update={"zero_stage": stage, "expert_parallel": 2})
    predicted = checkpoint_bytes(run.model_copy(update={"parallel": parallel}))
    saved = sum(f.stat().st_size for f in (made / "run/step-00000002").glob("*.safetensors"))
    assert predicted < saved < 1.5 * predicted


def test_hostfile_that_is_missing_is_an_error_of_the_user(capsys, tmp_path):
    assert main(["doctor", "--hostfile", str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_hosts_of_a_hostfile_are_asked_by_ssh_and_compared(capsys, file, tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"  # the host `far` is gone, others are this machine
    ssh.write_text(
        '#!/bin/bash\nhost="${@: -2:1}" script="${@: -1}"\n'
        'if [ "$host" = far ]; then echo "ssh: no route" >&2; exit 255; fi\n'
        'SSH_CONNECTION="127.0.0.1 1 127.0.0.1 22" exec bash -c "$script"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("near slots=1\nfar slots=1\n")
    findings, faults = doctor(capsys, "--hostfile", str(tmp_path / "hosts"), "--config", file)
    ((check, text),) = faults
    assert check == "host"
    assert "far" in text
    assert "ssh: no route" in text
    assert {f["check"] for f in findings} >= {"clocks", "network"}
