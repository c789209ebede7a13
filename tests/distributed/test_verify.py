"""`moa-dist verify` finds sound layouts equal, and names what is wrong with broken ones."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from moa_dist.cli.verify import as_text
from moa_dist.config import Config, load_config
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.start import DistContext
from moa_dist.models.language_model import LanguageModel, materialize
from moa_dist.moe.experts import expert_layers
from moa_dist.verify.compare import Check
from moa_dist.verify.verify import Report, make_batch, verify
from tests.config.test_shipped_configs import CONFIGS

MODELS = {
    "moeut": (
        "moeut/44m.yaml",
        "model.attention.router.capacity={factor: 1.0, policy: probability}",
        "model.ffn.router.capacity={factor: 1.0, policy: position}",
    ),
    "moa": ("moa/moe_ffn.yaml", "model.attention.router.top_k=3"),
    "dense": ("dense/44m.yaml", "train.recompute=true"),
}


def config_of(model: str, *overrides: str) -> Config:
    file, *choices = MODELS[model]
    return load_config(CONFIGS / file, [*choices, *overrides])


def on_rank(config: Config) -> Report:
    return verify(config, make_mesh(config.parallel.expert_parallel), torch.device("cpu"))


def report_of(pools, config: Config, world_size: int, run: Callable = on_rank) -> Report:
    first, *others = pools(world_size).run(run, config)
    assert all(other.checks == first.checks for other in others)
    return first


def differences(report: Report) -> list[Check]:
    return [check for check in report.checks if not check.equal]


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_choices_about_balance_are_equal(pools, scope):
    config = config_of(
        "moeut",
        "parallel.expert_parallel=2",
        "parallel.zero_stage=1",
        "train.micro_batch=32",  # no accumulation, which global_batch refuses
        "model.attention.router.balance.bias_rate=0.1",
        f"model.attention.router.balance.scope={scope}",
        f"model.ffn.router.balance.scope={scope}",
        "model.ffn.router.balance.bias_rate=0.1",
        "model.ffn.router.balance.mutual_information=0.1",
    )
    assert differences(report_of(pools, config, world_size=2)) == []


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_sound_layout_is_equal(pools, model, zero_stage):
    bf16 = (model, zero_stage) == ("moeut", 2)
    config = config_of(
        model,
        f"parallel.zero_stage={zero_stage}",
        f"parallel.expert_parallel={1 if model == 'dense' else 2}",
        f"train.precision={'bf16' if bf16 else 'fp32'}",
    )
    report = report_of(pools, config, 2)
    assert not differences(report)
    assert report.precision == ("fp32" if zero_stage else "fp64")
    assert any("bf16" in check.what for check in report.checks) == bf16
    assert report.real_share < 0.9
    if model == "moeut":
        assert report.idle_experts > 0
        assert report.dropped > 0


def test_documents_are_equal(pools):
    config = config_of(
        "moeut",
        "parallel={expert_parallel: 2, zero_stage: 0}",
        "train.precision=fp64",
        "data.document_attention=true",
    )
    assert differences(report_of(pools, config, 2)) == []
    found = make_batch(report_of(pools, config, 2).config, 0).documents
    assert found is not None
    assert min(found.lengths) < max(found.lengths)


def test_gathered_weights_on_four_ranks_are_equal(pools):
    config = config_of(
        "moeut",
        "parallel={expert_parallel: 2, zero_stage: 3}",
        "parallel.expert_exchange={attention: weights, ffn: auto}",  # decided for the whole
        "parallel.overlap=on",
        "train={precision: fp32, recompute: true, micro_batch: 4}",
        "model.attention.router.group_sequences=2",
    )
    report = report_of(pools, config, 4)
    assert not differences(report)
    assert report.config.model.attention.router.group_sequences == 2


def test_data_differs_between_ranks_and_tokens_within_a_sequence():
    config = config_of("moeut")
    batch = make_batch(config, 0)
    assert len({tuple(row.tolist()) for row in batch.tokens[:, :16]}) == len(batch.tokens)
    assert all(len(set(row.tolist())) == len(row) for row in batch.tokens)
    lengths = batch.token_mask.sum(1)
    assert lengths.max() == batch.tokens.shape[1]
    assert lengths.min() == 0


def with_fault(fault: Callable[[LanguageModel], None], config: Config) -> Report:
    """On every rank: verify, but the layout's model, and it alone, has a fault."""

    def build(*args, **keywords) -> LanguageModel:
        model = materialize(*args, **keywords)
        fault(model)
        return model

    with mock.patch("moa_dist.train.build.materialize", build):
        return on_rank(config)


def double_expert_gradients(model: nn.Module) -> None:
    for _, layer in expert_layers(model):
        layer.weight.register_hook(lambda gradient: 2 * gradient)


def move_a_shard(model: nn.Module) -> None:
    """One weight of one expert on the last rank."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        with torch.no_grad():
            model.stack.layers[1].ffn.down.weight[0, 0, 0] += 1e-3


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_wrong_factor_on_expert_gradients_is_named(pools, zero_stage):
    config = config_of(
        "moeut",
        f"parallel={{expert_parallel: 2, zero_stage: {zero_stage}}}",
        f"train.precision={'bf16' if zero_stage else 'fp32'}",
    )
    report = report_of(pools, config, 2, partial(with_fault, double_expert_gradients))
    found = {check.what: check for check in differences(report)}
    assert set(found) >= {"gradient norm on every rank", "gradients", "parameters, clipped SGD"}
    assert not {"logits", "loss", "assignments per expert"} & set(found)
    assert found["gradients"].where == "stack.layers.0.attention.v.weight"
    assert found["gradients"].deviation == pytest.approx(1, abs=1e-3)
    if zero_stage:
        assert found["expert gradients in bf16"].deviation == pytest.approx(1, abs=0.1)
        assert "dense gradients in bf16" not in found


def test_one_wrong_weight_of_one_rank_is_named(pools):
    config = config_of(
        "moa", "parallel.expert_parallel=2", "parallel.zero_stage=2", "train.precision=fp32"
    )
    report = report_of(pools, config, 2, partial(with_fault, move_a_shard))
    found = {check.what: check for check in differences(report)}
    assert found["initial parameters"].where == "stack.layers.1.ffn.down.weight"
    assert found["initial parameters"].deviation == pytest.approx(1e-3, rel=0.1)
    assert not report.equal
    assert "logits" in found
    text = as_text(config, DistContext(0, 2, torch.device("cpu"), "gloo"), report)
    last = text.splitlines()[-1]
    assert last.startswith("DIFFERENT: ")
    assert "W 2 = ep 2 x edp 1, ZeRO 2" in last
    assert "stack.layers.1.ffn.down.weight" in last
    assert "1.0e-03" in last


def test_nan_is_not_equal():
    assert not Check("loss", float("nan"), 1.0).equal
