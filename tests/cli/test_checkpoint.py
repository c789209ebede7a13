"""`moa-dist checkpoint` and `moa-dist export` show, find and rewrite without changing a value."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import moa_dist
from moa_dist.checkpoint.check import damage
from moa_dist.checkpoint.format import Reader, read_model
from moa_dist.cli.main import main
from moa_dist.provenance import provenance
from moa_dist.units import short
from tests.evaluate.runs import LENGTH, VOCABULARY


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def alter(checkpoint) -> None:
    path = checkpoint / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def printed(capsys, *arguments, status=0) -> str:
    assert main([*map(str, arguments)]) == status
    return capsys.readouterr().out


def logits(model) -> torch.Tensor:
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    return model(tokens).logits


def test_show(run, capsys):
    text = printed(capsys, "checkpoint", "show", run)
    size = short(sum(Reader(run / "step-00000001").index.files.values()))
    _, first, made_by, second, last = text.splitlines()
    assert first.split() == f"1 2 {size}B W 1 ep 1 ZeRO 1 complete".split()
    assert made_by.split() == f"by {provenance()}".split()  # the second one, too
    assert second.endswith("valid")
    assert str(run / "step-00000002") in last
    alter(run / "step-00000002")
    report = json.loads(printed(capsys, "checkpoint", "show", run, "--json"))
    assert [row["state"] for row in report["checkpoints"]] == ["valid", "damaged"]
    assert "rank-00000.safetensors" in report["checkpoints"][1]["problem"]
    assert report["continue_from"] == str(run / "step-00000001")
    assert report["checkpoints"][0]["provenance"] == asdict(provenance())
    (run / "step-00000001/checkpoint.json").unlink()
    report = json.loads(printed(capsys, "checkpoint", "show", run, "--json"))
    assert [row["state"] for row in report["checkpoints"]] == ["damaged", "damaged"]
    assert report["continue_from"] is None
    text = printed(capsys, "checkpoint", "show", run)
    assert all(row["problem"] in text for row in report["checkpoints"])


def test_average(run, tmp_path, capsys):
    target = tmp_path / "mean"
    assert str(target) in printed(capsys, "checkpoint", "average", run, target)
    parts = [read_model(run / f"step-0000000{step}")[0].state_dict() for step in (1, 2)]
    model, index = read_model(target)
    assert damage(target) == []
    assert index.step == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, ((parts[0][name].double() + parts[1][name]) / 2).float()), name
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    assert main(["checkpoint", "average", str(run), str(target)]) == 2  # it exists
    last = tmp_path / "last"
    printed(capsys, "checkpoint", "average", run, last, "--last", "1")
    for name, value in read_model(last)[0].state_dict().items():
        assert torch.equal(value, parts[1][name])
    assert main(["checkpoint", "average", str(tmp_path / "data"), str(tmp_path / "none")]) == 2
    assert str(tmp_path / "data") in capsys.readouterr().err


def test_verify(run, capsys):
    folders = [str(run / f"step-0000000{step}") for step in (1, 2)]
    lines = printed(capsys, "checkpoint", "verify", run).splitlines()
    assert [tuple(line.split(": ")) for line in lines] == [(folder, "ok") for folder in folders]
    alter(run / "step-00000002")
    sound, damaged, problem = printed(capsys, "checkpoint", "verify", run, status=1).splitlines()
    assert sound == lines[0]
    assert damaged.partition(": ")[0] == folders[1]
    assert "rank-00000.safetensors" in problem
    printed(capsys, "checkpoint", "verify", run / "step-00000001")
    printed(capsys, "checkpoint", "verify", run / "step-00000002", status=1)


@pytest.mark.parametrize(("options", "num_files"), [([], 1), (["--files", "3"], 3)])
def test_converted_holds_the_same(run, tmp_path, capsys, options, num_files):
    target = tmp_path / "archive/small"
    assert str(target) in printed(capsys, "checkpoint", "convert", run, target, *options)
    assert damage(target) == []
    old, new = Reader(run / "step-00000002"), Reader(target)
    assert new.index.tensors.keys() == old.index.tensors.keys()
    assert len(new.index.files) == num_files
    assert max(new.index.files.values()) < 2 * sum(new.index.files.values()) / num_files
    for name, pieces in old.index.tensors.items():
        ours, theirs = (torch.full((pieces[-1].start + pieces[-1].numel,), -1.0) for _ in "ab")
        new.read_into(name, 0, ours)
        old.read_into(name, 0, theirs)
        assert torch.equal(ours, theirs)
    assert sorted(p.name for p in target.parent.iterdir()) == ["small"]


def test_without_moments_it_still_generates(run, tmp_path, capsys):
    target = tmp_path / "weights"
    printed(capsys, "checkpoint", "convert", run / "step-00000002", target, "--weights-only")
    assert {name.rpartition("/")[2] for name in Reader(target).index.tensors} == {"master"}
    ask = ["--prompt", "the", "--tokens", 8]
    assert printed(capsys, "generate", target, *ask) == printed(capsys, "generate", run, *ask)


def test_export_is_the_same_model(run, tmp_path, capsys):
    target = tmp_path / "exported"
    assert "load_model" in printed(capsys, "export", run, target)
    assert sorted(p.name for p in target.iterdir() if p.suffix != ".py") == [
        "SHA256SUMS",
        "config.json",
        "config.yaml",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected = logits(read_model(run / "step-00000002")[0])
    for path in (target, str(target), run, run / "step-00000002"):
        assert torch.equal(logits(moa_dist.load_model(path)), expected)
    ask = ["--prompt", "the", "--tokens", 8]
    assert printed(capsys, "generate", target, *ask) == printed(capsys, "generate", run, *ask)
    ours, theirs = (json.loads(printed(capsys, "eval", p, "--json")) for p in (target, run))
    assert ours.pop("checkpoint") != theirs.pop("checkpoint")
    assert ours == theirs


def test_export_in_bf16(run, tmp_path, capsys):
    sizes = {}
    for dtype in ("fp32", "bf16"):
        printed(capsys, "export", run, tmp_path / dtype, "--dtype", dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["bf16"] < 0.6 * sizes["fp32"]
    ours, theirs = (moa_dist.load_model(tmp_path / d).state_dict() for d in ("bf16", "fp32"))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.bfloat16().float())


@pytest.mark.parametrize("command", [["export"], ["checkpoint", "convert"]])
def test_nothing_is_made_of_damage_or_over_something(run, tmp_path, capsys, command):
    (tmp_path / "there").mkdir()
    assert main([*command, str(run), str(tmp_path / "there")]) == 2
    assert str(tmp_path / "there") in capsys.readouterr().err
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/new", Path("/proc/new")):
        assert main([*command, str(run), str(place)]) == 2
        assert str(place) in capsys.readouterr().err
    alter(run / "step-00000002")
    assert main([*command, str(run), str(tmp_path / "new")]) == 2
    assert str(run / "step-00000002/rank-00000.safetensors") in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "a"]])
def test_what_was_altered_is_not_used(run, capsys, command):
    """A single flipped bit, which no other check would see."""
    alter(run / "step-00000002")
    assert main([*command, str(run)]) == 2
    assert str(run / "step-00000002/rank-00000.safetensors") in capsys.readouterr().err
    assert main([*command, str(run / "step-00000001")]) == 0


@pytest.mark.parametrize(
    "kind", ["other model", "cut", "not a file of tensors", "another bit", "no checksums"]
)
def test_a_damaged_export_says_so(run, tmp_path, capsys, kind):
    target = tmp_path / "exported"
    printed(capsys, "export", run, target)
    model, config = target / "model.safetensors", target / "config.yaml"
    if kind == "cut":
        model.write_bytes(model.read_bytes()[:-9])
    elif kind == "other model":
        config.write_text(config.read_text().replace("d_model: 16", "d_model: 32"))
    elif kind == "another bit":
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    elif kind == "no checksums":
        (target / "SHA256SUMS").unlink()
    else:
        model.write_bytes(b"x")
    assert main(["generate", str(target), "--prompt", "a"]) == 2
    assert str(target) in capsys.readouterr().err


def test_a_folder_of_transformers_says_so(run, tmp_path, capsys):
    target = tmp_path / "exported"
    printed(capsys, "export", run, target)
    (target / "config.yaml").rename(target / "config.json")
    assert main(["generate", str(target), "--prompt", "a"]) == 2
    assert "moa-dist import jetmoe" in capsys.readouterr().err


def test_no_pickle_can_be_read():
    """Checkpoints and exports are safetensors and JSON: nothing that executes when it is read."""
    for path in Path(moa_dist.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
        assert "import pickle" not in text, path
