"""How ranks on other hosts are started, and how errors of ssh are explained."""

import os
import sys

import pytest

from moa_dist.launch import ssh
from moa_dist.launch.preflight import Preflight
from moa_dist.launch.ssh_launcher import exported, launcher_arguments


def test_deepspeed_gets_arguments_for_all_that_it_would_guess_wrongly(tmp_path):
    checked = Preflight(master_addr="10.0.0.1", master_port=17000)
    arguments = launcher_arguments(tmp_path, tmp_path / "hostfile", checked)
    words = " ".join(arguments)
    assert "--force_multi" in arguments  # else one remote host's ranks would start here
    assert "--no_ssh_check" in arguments  # the check ignores the arguments for ssh
    assert "--master_addr 10.0.0.1 --master_port 17000" in words
    assert words.endswith(f"--module moa_dist.launch.rank {tmp_path}")  # no command for shells


def test_variables_of_the_job_are_passed_on_and_those_of_the_machine_are_not():
    given = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "0",
        "MOA_DIST_HOST": "here",
        "MOA_DIST_JOB_SECRET": "x",
        "HOME": "/home/me",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    assert exported(given) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}


def test_command_on_a_host_survives_its_shell(tmp_path, monkeypatch):
    odd = tmp_path / "a folder; with $signs"
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setenv("PYTHONPATH", f".:{odd}/x")
    command = ssh.on_host("node-a", "some.module", "-p 2222 -F 'my config'")
    assert command[:5] == ["ssh", "-p", "2222", "-F", "my config"]
    assert "BatchMode=yes" in command  # never asks for a password
    assert command[-2] == "node-a"
    assert f"cd '{odd}' && exec env 'PYTHONPATH={odd}:{odd}/x' {sys.executable}" in command[-1]


@pytest.mark.parametrize(
    ("status", "error", "kind", "command"),
    [
        (255, "ssh: connect to host n port 22: No route to host", "unreachable", "ssh n true"),
        (255, "me@n: Permission denied (publickey).", "permission", "ssh-copy-id n"),
        (255, "Host key verification failed.", "host_key", "ssh n true"),
        (255, "ssh: Could not resolve hostname n: unknown", "name", "/etc/hosts"),
        (1, "bash: line 1: cd: /x: No such file", "folder", os.getcwd()),
        (127, "env: '/x/python': No such file", "python", ""),
        (1, "python: Error: No module named 'moa_dist'", "package", "pip install"),
        (1, "RuntimeError: odd", "check", ""),
        (3, "", "check", ""),
    ],
)
def test_why_a_host_does_not_answer(status, error, kind, command):
    failure = ssh.explain_ssh_failure("n", status, ["noise", error] if error else [])
    assert failure.kind == kind
    assert failure.is_connection == (status == 255)
    assert failure.text.endswith(error or str(status))
    assert command in failure.remedy
    assert bool(failure.remedy) == (kind != "check")
