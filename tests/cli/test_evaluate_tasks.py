"""`moa-dist eval --tasks`: the scorer's numbers, on one process and on ranks alike."""

import json
import re
import subprocess
import sys

import pytest

from moa_dist.cli.main import main
from moa_dist.distributed.network import free_port
from moa_dist.evaluate.scoring import Request, scorer_of
from moa_dist.evaluate.trained import load_trained

PAIRS = [(f"{n} cafés sell things.", f"{n} café sell {n} things.") for n in range(12)]


@pytest.fixture
def blimp(tmp_path):
    file = tmp_path / "pairs.jsonl"
    names = {"uid": "number", "phenomenon": "agreement"}
    records = [{"good": good, "bad": bad} | names for good, bad in PAIRS]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"blimp={file}"


def test_as_json(made, blimp, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("the café sells things\nin 日本 it sells 9\n")
    more = tmp_path / "more.txt"
    more.write_text("many " * 30 + "\n")
    command = ["eval", str(made / "run"), "--json", "--tasks", blimp, f"lambada={words}"]
    assert main([*command, f"lambada={more}"]) == 0
    out, err = capsys.readouterr()
    assert "100.0 %" in err
    report = json.loads(out)
    assert "perplexity" not in report
    assert report["tasks"]["lambada"]["examples"] == 3
    assert report["tasks"]["lambada"]["cut"] == 1, "the last is longer than the model sees"
    assert report["tasks"]["lambada"]["groups"]["file"].keys() == {"words.txt", "more.txt"}
    scorer = scorer_of(load_trained(made / "run"), 8)
    scores = [scorer.score([Request("", text) for text in pair]) for pair in PAIRS]
    share = sum(good.log_likelihood > bad.log_likelihood for good, bad in scores) / len(PAIRS)
    task = report["tasks"]["blimp"]
    assert task["examples"] == len(PAIRS)
    assert task["accuracy"]["value"] == pytest.approx(share)
    assert task["groups"]["paradigm"]["number"] == task["accuracy"]


def test_as_text_with_perplexity(made, blimp, capsys):
    data = str(made / "data/valid")
    assert main(["eval", str(made / "run"), "--data", data, "--tasks", blimp]) == 0
    out = capsys.readouterr().out
    assert re.search(r"bits per byte +\d", out)
    assert re.search(rf"blimp, {len(PAIRS)} .*\n +accuracy +0\.", out)


def test_ranks_print_once_what_one_process_prints(made, blimp, capsys):
    command = ["eval", str(made / "run"), "--micro-batch", "1", "--json"]
    command += ["--data", str(made / "data/valid"), "--tasks", blimp]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)
    # Not --standalone: it resolves this host's name, which fails in some containers.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher += ["-m", "moa_dist.cli.main"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert report.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
    assert report == expected


@pytest.mark.parametrize(
    ("task", "word"),
    [("blimp", "NAME=PATH"), ("blimp=", "NAME=PATH"), ("glue=x", "blimp, lambada")],
)
def test_there_is_no_such_task(capsys, task, word):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "run", "--tasks", task])
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--tasks" in message
    assert word in message


def test_sequences_are_not_examples(made, blimp, capsys):
    assert main(["eval", str(made / "run"), "--tasks", blimp, "--sequences", "3"]) == 2
    assert "--sequences" in capsys.readouterr().err


def test_a_file_that_is_not_there(made, tmp_path, capsys):
    assert main(["eval", str(made / "run"), "--tasks", f"piqa={tmp_path / 'gone'}"]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err
