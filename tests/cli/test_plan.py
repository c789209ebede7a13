"""`moa-dist plan` prints counts as text and as JSON."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from moa_dist.cli.main import main
from moa_dist.data.mixture import Mixture, Stage
from tests.small_shards import write_folder

CONFIG = str(Path(__file__).parents[2] / "configs" / "moeut" / "44m.yaml")


def plan(capsys, *arguments):
    assert main(["plan", CONFIG, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_keys_are_stable(capsys):
    result = plan(capsys, "train.precision=bf16", "--expert-parallel", "1", "--zero-stage", "2")
    assert set(result) == {
        "name",
        "parameters",
        "sequence_length",
        "macs",
        "flops_per_token",
        "evaluation",
        "layout",
        "bytes_per_rank",
        "expert_exchange",
        "traffic_per_rank_and_step",
        "state_bytes_per_rank_and_step",
        "gathered_weights_bytes",
        "data",
    }
    assert result["data"] is None  # it is not here
    assert set(result["parameters"]) == {"total", "active", "experts", "dense", "per_rank"}
    assert set(result["macs"]) == {"by_part", "blocks", "head", "total"}
    active, macs = result["parameters"]["active"], result["macs"]
    assert result["evaluation"] == {"active_parameters": active, "macs": macs}
    assert set(result["bytes_per_rank"]) == {
        "parameters",
        "gradients",
        "optimizer",
        "master",
        "total",
    }
    assert result["parameters"]["total"] == 44_345_792
    assert result["sequence_length"] == 1024
    # bf16 on one rank: weight 2, gradient 4 (summed in fp32), moments 8, master 4 bytes.
    assert result["bytes_per_rank"]["total"] == 18 * 44_345_792


def test_layout_options_win_over_the_configuration(capsys):
    one = plan(capsys, "--expert-parallel", "1")
    four = plan(capsys, "parallel.expert_parallel=1", "--expert-parallel", "4", "--zero-stage", "1")
    assert one["layout"]["world_size"] == 1
    layout = four["layout"]
    assert (layout["world_size"], layout["expert_parallel"], layout["zero_stage"]) == (4, 4, 1)
    assert four["macs"] == one["macs"]
    # 155 FFN experts over 4 ranks: the fullest has 39.
    dense, experts = one["parameters"]["dense"], one["parameters"]["experts"]
    per_rank = four["parameters"]["per_rank"]
    assert dense + experts / 4 < per_rank < dense + experts * 39 / 155 + 1


def test_text(capsys):
    assert main(["plan", CONFIG, "--world-size", "4", "--expert-parallel", "2"]) == 0
    text = capsys.readouterr().out
    assert "W 4 = ep 2 x edp 2" in text
    assert "44,345,792" in text
    assert plan(capsys, "--world-size", "4", "--expert-parallel", "2")["layout"]["problems"] == []


def test_ranks_that_could_not_start_are_planned_and_named(capsys):
    assert main(["plan", CONFIG, "--world-size", "3", "--expert-parallel", "1"]) == 0
    text = capsys.readouterr().out
    problems = plan(capsys, "--world-size", "3", "--expert-parallel", "1")["layout"]["problems"]
    assert any("data.readers" in problem for problem in problems)
    assert all(problem in text for problem in problems)


def test_expert_parallelism_that_does_not_divide_the_ranks(capsys):
    assert main(["plan", CONFIG, "--world-size", "3", "--expert-parallel", "2"]) == 2
    assert "parallel.expert_parallel" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--world-size", "--expert-parallel"])
def test_there_is_no_layout_of_zero_ranks(capsys, option):
    with pytest.raises(SystemExit) as exit:
        main(["plan", CONFIG, option, "0"])
    assert exit.value.code == 2
    assert re.search(rf"argument {option}: .*\b1\b", capsys.readouterr().err)


def test_changes_may_stand_anywhere(capsys):
    before = plan(capsys, "train.precision=bf16", "--expert-parallel", "1")
    assert plan(capsys, "--expert-parallel", "1", "train.precision=bf16") == before
    assert main(["config", "check", "--world-size", "4", CONFIG, "train.steps=5000"]) == 0
    assert main(["config", "check", CONFIG, "--world-size", "3", "train.steps=5000"]) == 2
    assert main(["plan", CONFIG, "--json", "neither"]) == 2
    assert "neither" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["plan", CONFIG, "--jsonn"])
    assert exit.value.code == 2


def test_cluster(capsys):
    arguments = ["--gpus", "8", "--gpu", "a100", "--gpus-per-node", "4", "data.readers=8"]
    result = plan(capsys, *arguments, "--network-gb", "10", "--layouts", "3")
    assert result["cluster"]["network_bandwidth"] == 10e9
    assert result["problems"] == []
    detailed = result["detailed"]
    assert detailed["title"] == "as configured"
    lines = [line for part in detailed["memory"].values() for line in part]
    passing = sum(line["bytes"] for line in detailed["memory"]["updating"])
    assert detailed["bytes"] == (
        sum(line["bytes"] for line in lines) - passing + detailed["margin_bytes"]
    )
    assert len(result["layouts"]) == 3
    # What it proposes is planned as proposed.
    best = result["layouts"][0]
    again = plan(capsys, *best["overrides"], *arguments, "--network-gb", "10")["detailed"]
    assert again["seconds"] == best["seconds"]
    assert again["bytes"] == best["bytes"]
    assert main(["plan", CONFIG, *arguments]) == 0
    text = capsys.readouterr().out
    assert "layers 16 x" in text
    assert "MFU" in text


def test_optimizer_in_host_memory(capsys):
    """It is proposed where nothing else fits, and counted for a node, not for the GPU."""
    arguments = ["--gpus", "8", "data.readers=8", "--zero-stage", "2"]
    here = plan(capsys, *arguments)["detailed"]
    assert here["host_memory"] == {}
    there = plan(capsys, *arguments, "optimizer.offload=host")["detailed"]
    assert there["memory"].keys().isdisjoint({"masters", "moments"})
    assert there["host_memory"]["moments"] == here["memory"]["moments"]
    assert there["bytes"] < here["bytes"]
    assert there["seconds"] > here["seconds"]
    arguments = ["--gpus", "2", "data.readers=8", "--layouts", "1000"]
    reasons = plan(capsys, *arguments, "--memory-gib", "2.01")["do_not_fit"]
    needed = [re.search(r": ([\d.]+) GiB of which", reason) for reason in reasons]
    least = min(float(found[1]) for found in needed)
    result = plan(capsys, *arguments, "--memory-gib", str(least - 0.06))
    assert result["layouts"]
    assert result["do_not_fit"]
    assert all("optimizer.offload=host" in layout["overrides"] for layout in result["layouts"])
    assert main(["plan", CONFIG, *result["layouts"][0]["overrides"], *arguments[:3]]) == 0
    assert "host memory" in capsys.readouterr().out
    muon = ["--memory-gib", "2.01", "optimizer.kind=muon"]
    assert not plan(capsys, *arguments, *muon)["layouts"]


def test_configuration_that_does_not_fit_the_cluster(capsys):
    """The best layout takes its place; without any it is an error."""
    result = plan(capsys, "--gpus", "64")
    assert result["problems"]
    assert result["detailed"]["title"] == "the best layout"
    assert main(["plan", CONFIG, "--gpus", "128"]) == 2
    assert "train.global_batch" in capsys.readouterr().err
    assert main(["plan", CONFIG, "--gpus", "12"]) == 2
    assert "--gpus-per-node" in capsys.readouterr().err
    assert main(["plan", CONFIG, "--gpus", "8", "train.precision=fp64", "--zero-stage", "0"]) == 2
    assert "train.precision=bf16" in capsys.readouterr().err


def test_epochs_are_those_that_a_run_counts(tmp_path, capsys):
    manifests = {name: write_folder(tmp_path / name, n) for name, n in (("a", 8), ("b", 3))}
    train = f"[{{path: {tmp_path}/a, weight: 0.7}}, {{path: {tmp_path}/b, weight: 0.3, "
    train += "later_weights: [[100, 1.4], [101, 0.1]]}]"
    sizes = ("train.steps=25", "train.global_batch=16", "train.micro_batch=2")
    result = plan(capsys, f"data.train={train}", "data.readers=4", *sizes)["data"]
    stages = (
        Stage(0, {"a": 0.7, "b": 0.3}),
        Stage(100, {"a": 0.7, "b": 1.4}),
        Stage(101, {"a": 0.7, "b": 0.1}),
    )
    mixture = Mixture(stages, 4)
    counted = Counter(mixture.locate(sample)[0] for sample in range(25 * 16))
    assert result == {
        name: {
            "samples": counted[name],
            "share": counted[name] / 400,
            "epochs": counted[name] / manifest.num_samples,
        }
        for name, manifest in manifests.items()
    }
    assert main(["plan", CONFIG, f"data.train={train}", *sizes]) == 0
    assert re.search(r"^  b .* epochs$", capsys.readouterr().out, re.MULTILINE)
