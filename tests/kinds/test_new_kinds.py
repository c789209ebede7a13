"""A new attention, feed-forward or router kind is three things, and everything else follows.

The kinds are those of `tests/kinds/toy.py`. Nothing of the package is patched but the three lists.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moa_dist
from moa_dist.cli.main import main
from moa_dist.config import to_yaml
from moa_dist.config.checks import check_fields
from moa_dist.config.model import ModelConfig
from moa_dist.models.counts import count
from moa_dist.models.language_model import build_model
from moa_dist.transfer.upcycle_checks import problems_of
from tests.evaluate.runs import one_thread, prepare_text
from tests.evaluate.without_package import read_elsewhere, tokens_for
from tests.kinds.case import (
    D_FF,
    D_HEAD,
    D_HIDDEN,
    D_MODEL,
    EXPERTS,
    HEADS,
    LAYERS,
    TOP_K,
    VOCABULARY,
    config_of,
)
from tests.transfer.runs import make_run

pytestmark = pytest.mark.usefixtures("toy")


def test_it_is_counted():
    counts = count(config_of().model, 10)
    routers = sum(D_MODEL * D_HIDDEN + D_HIDDEN * n for n in (HEADS, EXPERTS))
    attention = 3 * D_MODEL * HEADS * D_HEAD
    experts = {"heads": D_HEAD * D_MODEL, "ffn": D_MODEL * D_MODEL}
    dense_ffn = 2 * D_MODEL * D_FF
    norms = 2 * 2 * D_MODEL
    around = 2 * VOCABULARY * D_MODEL + VOCABULARY + 2 * D_MODEL
    dense = LAYERS * (routers + attention + dense_ffn + norms) + around
    assert counts.experts == LAYERS * (HEADS * experts["heads"] + EXPERTS * experts["ffn"])
    assert counts.total == dense + counts.experts
    assert counts.training.active == dense + LAYERS * TOP_K * sum(experts.values())
    assert counts.training.macs["routers"] == LAYERS * 10 * routers
    assert counts.training.macs["experts"] == LAYERS * 10 * TOP_K * sum(experts.values())


def write_config(tmp_path: Path, **changes: int | str) -> str:
    file = tmp_path / "toy.yaml"
    file.write_text(to_yaml(config_of(**changes)))
    return str(file)


@pytest.mark.parametrize("exchange", ["tokens", "weights", "auto"])
def test_one_layout_is_planned(tmp_path, capsys, exchange):
    file = write_config(tmp_path, expert_parallel=2, exchange=exchange)
    assert main(["plan", file, "--world-size", "4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["total"] == count(config_of().model, 16).total


def test_layouts_are_ranked(tmp_path, capsys):
    file = write_config(tmp_path)
    assert main(["plan", file, "--gpus", "8", "--gpu", "h100", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layouts"]) > 1


def test_its_own_constraint_is_reported_with_the_others():
    config = config_of()
    taking_all = config.model.attention.with_routers(top_k=HEADS)
    model = config.model.model_copy(update={"attention": taking_all})
    (found,) = check_fields(config.model_copy(update={"model": model}))
    assert found.keys == ("model.attention.router.top_k", "model.attention.router.num_experts")


def test_too_many_ranks_for_its_experts_are_refused(tmp_path, capsys):
    assert main(["config", "check", write_config(tmp_path, expert_parallel=8)]) != 0
    assert "parallel.expert_parallel" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "toy"
    model = build_model(config_of().model, seed=3)
    make_run(folder, model)
    return folder


def test_it_is_analyzed(run, tmp_path):
    text = tmp_path / "valid"
    prepare_text(text, tokenizer=run.parent / "tokenizer.json", length=12)
    with one_thread():
        assert (
            main(["analyze", str(run), "--data", str(text), "--output", str(tmp_path / "a")]) == 0
        )
    results = json.loads((tmp_path / "a" / "analysis.json").read_text())
    shapes = {r["router"]: len(r["load"][0]) for r in results["routers"]}
    assert shapes == {"attention.query": HEADS, "ffn": EXPERTS}
    assert [len(layer["heads"]) for layer in results["attention"]] == [HEADS] * LAYERS


def test_exported_it_computes_the_same(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    tokens = torch.arange(24).view(2, 12)
    ours, theirs = (moa_dist.load_model(path)(tokens).logits for path in (run, tmp_path / "out"))
    assert torch.equal(ours, theirs)


@pytest.mark.full
def test_exported_it_runs_where_neither_it_nor_the_package_is_installed(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    read_elsewhere([tmp_path / "out"])
    found = load_file(f"{tmp_path / 'out'}.read.safetensors")["logits"]
    expected = moa_dist.load_model(run)(tokens_for(VOCABULARY)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_with_a_cache_it_generates_the_same():
    model = build_model(config_of().model, seed=3).double().eval()
    tokens = torch.arange(10).view(1, 10)
    whole = model(tokens).logits
    first = model(tokens[:, :6], cache=model.empty_cache())
    rest = model(tokens[:, 6:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_it_is_not_made_of_a_dense_part():
    model = config_of().model
    dense = ModelConfig.model_validate(
        model.model_dump()
        | {
            "attention": {"kind": "dense", "num_heads": HEADS, "d_head": D_HEAD},
            "ffn": {"kind": "dense", "d_ff": D_FF},
        }
    )
    found = [problem.keys for problem in problems_of(dense, model)]
    assert found == [("model.attention.kind",), ("model.ffn.kind",)]
