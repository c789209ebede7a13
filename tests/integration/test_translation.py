"""The commands of a translation model, end to end: prepare, train, average, eval, translate."""

import json
import re
import sys

import pytest

from moa_dist.cli.main import main
from moa_dist.errors import DataError
from moa_dist.evaluate.harness import HarnessModel
from tests.integration.test_commands import ROOT, lines, run
from tests.parallel_text import lines as parallel_lines
from tests.parallel_text import write_lines

CONFIG = """
name: tiny
model:
  objective: translation
  vocab_size: 300
  d_model: 16
  num_layers: 1
  norm_placement: post
  position: sinusoidal
  tie_embeddings: true
  dropout: 0.1
  attention:
    kind: moa
    d_head: 8
    rope: null
    router: {num_experts: 3, top_k: 2, score: softmax, balance: {switch: 0.01}}
  ffn: {kind: dense, d_ff: 16}
data: {train: train, valid: valid, sequence_length: 60, bucket_tokens: 128}
schedule: {kind: inverse_sqrt, warmup_steps: 2}
train: {steps: 4, global_batch: 4, micro_batch: 2, label_smoothing: 0.1}
logging: {every: 1}
evaluation: {every: 2}
checkpoint: {every: 2}
"""


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    for part, count, more in (("train", 90, ["--vocab-size", "300"]), ("valid", 9, [])):
        files = write_lines(tmp_path / f"{part}-text", parallel_lines(count, seed=count))
        tokenizer = more or ["--tokenizer", "train"]
        prepare = ["prepare", "--pairs", *map(str, files), "--output", part, *tokenizer]
        assert main([*prepare, "--sequence-length", "60"]) == 0
    output = run(
        sys.executable, str(ROOT / "launcher/train.py"), "--config", "tiny.yaml", cwd=tmp_path
    )
    assert re.search(r"\b4 buckets\b.*\b1 rank\b.*\b2\b.*\b2\b", output)
    steps = lines(tmp_path / "runs/tiny", "step")
    assert [line["samples"] for line in steps] == [4, 8, 12, 16]
    assert len({line["digest"] for line in steps}) == 4
    validation = lines(tmp_path / "runs/tiny", "validation")

    capsys.readouterr()
    assert main(["checkpoint", "average", "runs/tiny", "mean"]) == 0
    assert "steps 2, 4" in capsys.readouterr().out
    bleu = ["--bleu", *map(str, files), "--beam", "2", "--data", "valid", "--json"]
    assert main(["eval", "runs/tiny", *bleu]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(validation[-1]["loss"], rel=1e-5)
    assert report["bleu"]["texts"] == 9
    assert "version:" in report["bleu"]["signature"]
    assert main(["translate", "mean", "--input", str(files.source), "--beam", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert main(["analyze", "runs/tiny", "--min-count", "1"]) == 0
    analyzed = capsys.readouterr().out
    assert "tokens of valid" in analyzed
    assert "attention.cross.query" in analyzed
    assert main(["generate", "runs/tiny", "--prompt", "the"]) == 2
    assert "model.objective" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"\bcausal\b"):
        HarnessModel.create_from_arg_string("path=runs/tiny")
    (tmp_path / "long").write_text("the sea and the wind " * 90)
    assert main(["translate", "mean", "--input", "long", "--beam", "1"]) == 0
    assert re.search(r"\b1 of 1 texts\b.*\b60 tokens\b", capsys.readouterr().err)
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    assert main(["translate", "mean", "--input", "latin"]) == 2
    assert "latin" in capsys.readouterr().err
