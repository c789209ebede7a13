"""`moa-dist eval` reports the model's own loss, and refuses data that do not match it."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from moa_dist.cli.main import main
from moa_dist.data.manifest import load_manifest, sha256_of
from moa_dist.data.validation import validation_batches
from moa_dist.models.language_model import build_model
from tests.evaluate.runs import LENGTH, config, prepare_text


@torch.no_grad()
def direct_loss(made, seed, sequences=None):
    """Plain torch, all sequences at once; step n was saved with the initial weights of seed n."""
    folder = made / "data/valid"
    manifest = load_manifest(folder)
    count = min(sequences or manifest.num_samples, manifest.num_samples)
    options = {"rank": 0, "world_size": 1, "micro_batch": count, "sequences": count}
    ((tokens, _),) = validation_batches(folder, manifest, **options)
    logits = build_model(config(made).model, seed=seed).eval()(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), count


def test_loss_of_the_newest_checkpoint_as_json(made):
    # A process of its own: its stdout is JSON and nothing else, whatever libraries log.
    command = [sys.executable, "-m", "moa_dist.cli.main", "eval", str(made / "run")]
    command += ["--micro-batch", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "100.0 %" in done.stderr
    report = json.loads(done.stdout)
    expected, count = direct_loss(made, seed=2)
    assert count % 5, "no micro-batch is filled up"
    assert report["loss"] == pytest.approx(expected, rel=1e-6)
    assert report["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    manifest = load_manifest(made / "data/valid")
    bits = expected / math.log(2) * manifest.tokens / manifest.text_bytes
    assert report["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert report["tokens"] == count * LENGTH
    assert report["step"] == 2
    assert report["checkpoint"] == str(made / "run/step-00000002")


def test_one_checkpoint_and_few_sequences(made, capsys):
    assert main(["eval", str(made / "run/step-00000001"), "--sequences", "3"]) == 0
    text = capsys.readouterr().out
    expected, _ = direct_loss(made, seed=1, sequences=3)
    assert re.search(rf"loss +{expected:.4f}\n", text)
    assert re.search(rf"\b{3 * LENGTH} tokens", text)
    assert str(made / "run/step-00000001") in text


def refused(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_data_of_another_tokenizer_and_length(made, tmp_path, capsys):
    data = tmp_path / "data"
    prepare_text(data, length=LENGTH + 1, tokenizer=None)
    with (data / "manifest.json").open() as file:
        manifest = json.load(file)
    (data / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    message = refused(capsys, made / "run", "--data", data)
    assert f"--tokenizer {made / 'run'}" in message
    assert str(LENGTH + 1) in message
    assert f"--sequence-length {LENGTH}" in message


def test_the_remedy_works(made, tmp_path, capsys):
    prepare_text(tmp_path / "data", tokenizer=made / "run")
    assert main(["eval", str(made / "run"), "--data", str(tmp_path / "data")]) == 0
    assert "loss" in capsys.readouterr().out


def run_with_valid(made, tmp_path, valid):
    """A copy of the run whose newest checkpoint names other validation data."""
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    index = run / "step-00000002/checkpoint.json"
    content = json.loads(index.read_text())
    content["config"]["data"]["valid"] = valid
    index.write_text(json.dumps(content))
    sums = run / "step-00000002/SHA256SUMS"
    others = [line for line in sums.read_text().splitlines() if index.name not in line]
    others.append(f"{sha256_of(index.read_bytes())}  {index.name}")
    sums.write_text("\n".join(others) + "\n")
    return run


@pytest.mark.parametrize(
    ("valid", "word"),
    [(None, "data.valid"), ("gone", "gone")],
)
def test_a_run_without_its_validation_data(made, tmp_path, capsys, valid, word):
    message = refused(capsys, run_with_valid(made, tmp_path, valid))
    assert word in message
    assert "--data" in message


def test_each_of_several_validation_folders_and_all_together(made, tmp_path, capsys):
    folders = {"books": made / "data/valid", "web": made / "data/train"}
    valid = [{"name": name, "path": str(path)} for name, path in folders.items()]
    run = run_with_valid(made, tmp_path, valid)
    assert main(["eval", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = ["tokens", "loss", "perplexity", "bits_per_byte"]
    for name, path in folders.items():
        assert main(["eval", str(run), "--data", str(path), "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert "folders" not in alone
        assert report["folders"][name] == {key: alone[key] for key in ["data", *keys]}
    books, web = report["folders"].values()
    assert books["loss"] != web["loss"]
    assert report["tokens"] == books["tokens"] + web["tokens"]
    together = books["loss"] * books["tokens"] + web["loss"] * web["tokens"]
    assert report["loss"] == pytest.approx(together / report["tokens"])
    assert main(["eval", str(run)]) == 0
    losses = re.findall(r"loss +(\S+)\n", capsys.readouterr().out)
    assert losses == [f"{each['loss']:.4f}" for each in (books, web, report)]


def test_a_checkpoint_without_its_tokenizer(made, tmp_path, capsys):
    shutil.copytree(made / "run/step-00000002", tmp_path / "step-00000002")
    assert str(tmp_path / "tokenizer.json") in refused(capsys, tmp_path)


def test_no_checkpoint(tmp_path, capsys):
    assert str(tmp_path) in refused(capsys, tmp_path)


@pytest.mark.parametrize("option", ["--sequences", "--micro-batch"])
def test_there_are_no_zero_sequences(capsys, option):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "run", option, "0"])
    assert exit.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]
