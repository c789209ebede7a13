"""The `moa-dist` command: what it prints, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moa_dist.cli.main import COMMANDS, main
from moa_dist.config import load_config
from moa_dist.config.schema import walk
from tests.small_shards import write_folder


def test_help_lists_every_command_without_importing_torch():
    check = (
        "import sys, moa_dist.cli.main as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], check=True, capture_output=True, text=True, timeout=60
    )
    for name, (_, line) in COMMANDS.items():
        assert name in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize("arguments", [[], ["confg"], ["config"], ["config", "explain"]])
def test_unknown_or_missing_command_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: moa-dist" in capsys.readouterr().err


def test_show_prints_yaml_that_loads_to_the_same(base, write, capsys):
    assert main(["config", "show", base, "optimizer.lr=1e-4"]) == 0
    again = write(capsys.readouterr().out, "again.yaml")
    assert load_config(again) == load_config(base, ["optimizer.lr=1e-4"])


def test_check_prints_ok(base, capsys):
    assert main(["config", "check", base, "train.micro_batch=2", "--world-size", "2"]) == 0
    assert capsys.readouterr().out == "base.yaml: ok\n"


def test_check_prints_problems_without_a_traceback(base, capsys):
    assert main(["config", "check", base, "train.stepss=3", "train.micro_batch=3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    header, *problems = printed.err.splitlines()
    assert header.startswith("base.yaml: 2")
    assert "`train.stepss`" in problems[0]
    assert "`train.micro_batch`" in problems[1]


def test_check_knows_the_number_of_ranks(base, capsys):
    assert main(["config", "check", "--world-size", "3", base]) == 2
    header, *problems = capsys.readouterr().err.splitlines()
    assert "3 ranks" in header
    assert len(problems) == 3
    with pytest.raises(SystemExit):
        main(["config", "check", "--world-size", "0", base])


def test_interrupt_is_130(base, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moa_dist.cli.config.load_config", interrupt)
    assert main(["config", "check", base]) == 130


def test_fields_explains_every_kind(capsys):
    assert main(["config", "fields"]) == 0
    printed = capsys.readouterr().out
    (doc,) = (field.info.description for field in walk() if field.path == "optimizer.lr")
    first = doc.split(".")[0].split("\n")[0]
    assert f"optimizer.lr: a number above 0; default 0.00025\n    {first}" in printed
    kinds = "dense, moe, residual_moe, monet"
    assert f"model.ffn: a section, its kind one of {kinds}; required" in printed
    for field in ("scope", "mutual_information", "bias_rate"):
        routed = "(kind moe and residual_moe and monet)"
        assert f"model.ffn.router.balance.{field} {routed}" in printed
    kinds = "(kind moe and residual_moe)"
    assert f"model.ffn.d_expert {kinds}: an integer of at least 1; required" in printed


def test_check_notes_a_missing_folder_and_fails_where_data_are_to_be_checked(base, capsys):
    assert main(["config", "check", base]) == 0
    assert "data.train: there is no folder data/train" in capsys.readouterr().err
    assert main(["config", "check", base, "--data"]) == 2
    assert "data/train" in capsys.readouterr().err


def test_check_notes_token_ids_that_never_occur(base, capsys):
    manifest = write_folder(Path("data/train"))
    fitting = ["model.vocab_size=%d", "data.sequence_length=3", "parallel.expert_parallel=1"]
    for unused in (0, 5):
        overrides = [o.replace("%d", str(manifest.vocab_size + unused)) for o in fitting]
        assert main(["config", "check", base, "--data", *overrides]) == 0
        assert (f"{unused} ids never occur" in capsys.readouterr().err) is (unused > 0)
