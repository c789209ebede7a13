"""Relatives go through everything that a model goes through: plans, analysis, export, caches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moa_dist
from moa_dist.cli.main import main
from moa_dist.config import load_config, to_yaml
from moa_dist.config.data import SourceConfig
from moa_dist.config.objective_checks import objective_notes
from moa_dist.config.shrink import shrink
from moa_dist.errors import ExitCode
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.models.counts import count
from moa_dist.models.language_model import LanguageModel, build_model, dropless
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.routed_module import routed_modules
from moa_dist.moe.router import Router, Routing
from tests.distributed.layouts import Case
from tests.distributed.test_family import FAMILY, POSITIONS
from tests.distributed.test_halting import sharpened
from tests.evaluate.runs import one_thread, prepare_text
from tests.transfer.runs import make_run

CONFIGS = Path(moa_dist.__file__).parent.parent / "configs" / "family"
VOCABULARY = 270
relatives = pytest.mark.parametrize("relative", FAMILY)


def config_of(relative: str, **layout: object):
    model = POSITIONS | {"vocab_size": VOCABULARY} | FAMILY[relative]
    config = replace(Case(model=model), **layout).config()
    sources = [
        SourceConfig(path=f"task{task}", weight=1.0, task=task)
        for task in range(config.model.num_tasks)
    ]
    return config.changed(data=config.data.changed(train=tuple(sources))) if sources else config


def inputs(model: LanguageModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens, and the tasks of sequences if the model asks for them."""
    num_tasks = model.config.num_tasks
    tasks = {"tasks": torch.arange(len(tokens)) % num_tasks} if num_tasks else {}
    return {"tokens": tokens, **tasks}


def built(relative: str, *, recompute: bool | tuple[str, ...] = False):
    """A model whose tokens, where they halt, do so at depths of their own."""
    model = build_model(config_of(relative).model, seed=3, recompute=recompute)
    if model.config.halting is not None:
        sharpened(model)
    return model


@relatives
def test_it_is_planned(relative, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config_of(relative, precision="bf16", zero_stage=1)))
    assert main(["plan", str(file), "--world-size", "2", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["total"] == count(config_of(relative).model, 16).total
    assert main(["plan", str(file), "--gpus", "4", "--gpu", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"]


@relatives
def test_tokens_take_as_many_experts_as_the_section_says(relative):
    model, tokens = built(relative), torch.arange(20).view(2, 10)

    def check(router: Router, _inputs: object, routing: Routing) -> None:
        mean, most = router.config.experts_per_token(model.training)
        assert routing.topk_ids.shape[-1] == most
        assert routing.assigned is not None or mean == most

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(check)
    for training in (True, False):
        model.train(training)(**inputs(model, tokens))


def flops() -> FlopCounterMode:
    """Counts the products of torch's operators, sums in place included."""

    def of_sum(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
        return 2 * left.numel() * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_sum})


@pytest.mark.parametrize("relative", ["ds_moe", "bam"])
def test_work_is_what_torch_counts(relative):
    """A forward and a backward pass in training, and a forward in evaluation."""
    model, tokens = built(relative).double(), torch.arange(20).view(2, 10)
    for _, module in routed_modules(model):  # by torch's operators, which it can count
        module.dispatcher = LocalTokenDispatcher(grouped_experts)
    counts = count(model.config, 10)
    with sdpa_kernel(SDPBackend.MATH), flops() as training:
        model(tokens).logits.square().mean().backward()
    assert training.get_total_flops() == counts.flops_per_token * tokens.numel()
    with sdpa_kernel(SDPBackend.MATH), flops() as evaluation, torch.no_grad():
        model.eval()(tokens)
    assert evaluation.get_total_flops() == 2 * len(tokens) * counts.evaluation.total_macs
    assert (counts.training == counts.evaluation) == (relative != "ds_moe")


@relatives
def test_it_is_analyzed_and_exported(relative, tmp_path):
    folder = tmp_path / "runs" / "it"
    make_run(folder, built(relative))
    text = tmp_path / "valid"
    prepare_text(text, tokenizer=folder.parent / "tokenizer.json", length=12)
    out = tmp_path / "analysis"
    options = ["--data", str(text), "--output", str(out)]
    if config_of(relative).model.num_tasks:
        options += ["--task", "1"]
    with one_thread():
        assert main(["analyze", str(folder), *options]) == 0
    analysis = json.loads((out / "analysis.json").read_text())
    assert analysis["attention"]
    halts, recurs = relative == "sut", relative.startswith("mor_")
    assert bool(analysis["depths"]) == halts or recurs
    routers = config_of(relative).model.routers().values()
    has_norms = any(name.startswith("state_norm/") for name in analysis["token_means"])
    assert has_norms == any(router.is_recurrent for router in routers)
    if halts:  # at depths of their own, each router counting those that run
        (tokens,) = analysis["depths"].values()
        assert sum(number > 0 for number in tokens) > 1
        taken = sum(depth * number for depth, number in enumerate(tokens))
        for router in analysis["routers"]:
            assert sum(map(sum, router["load"])) == router["choices"] * taken
    if not halts and not recurs:
        for router in analysis["routers"]:
            decisions = router["num_tokens"] * len(router["load"])
            assert abs(sum(map(sum, router["load"])) / decisions - router["choices"]) <= 0.5
    if recurs:
        (tokens,) = analysis["depths"].values()
        routers = {router["router"]: router for router in analysis["routers"]}
        assert ("depth" in routers) == (relative == "mor_token")
        if "depth" in routers:  # each recursion has two layers
            assert [0, *routers["depth"]["load"][0]] == tokens[::2]
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    tokens = torch.arange(24).view(2, 12)
    loaded = [moa_dist.load_model(path) for path in (folder, tmp_path / "out")]
    ours, theirs = (model(**inputs(model, tokens)).logits for model in loaded)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("relative", [name for name in FAMILY if name != "mor_expert"])
def test_with_a_cache_it_generates_the_same(relative):
    model = dropless(built(relative)).double().eval()
    tokens = torch.arange(20).view(2, 10)
    whole = model(**inputs(model, tokens)).logits
    first = model(**inputs(model, tokens[:, :6]), cache=model.empty_cache())
    second = model(**inputs(model, tokens[:, 6:9]), cache=first.cache)
    third = model(**inputs(model, tokens[:, 9:]), cache=second.cache)
    parts = [output.logits for output in (first, second, third)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_what_looks_ahead_is_marked_and_continues_no_text(tmp_path, capsys):
    folder, text = tmp_path / "runs" / "it", tmp_path / "valid"
    model = build_model(config_of("mor_expert").model, seed=3)
    make_run(folder, model)
    prepare_text(text, tokenizer=folder.parent / "tokenizer.json", length=12)
    capsys.readouterr()
    assert main(["eval", str(folder), "--data", str(text), "--json"]) == 0
    reason = json.loads(capsys.readouterr().out)["looks_ahead"]
    assert reason == model.config.looks_ahead
    assert main(["eval", str(folder), "--data", str(text)]) == 0
    assert reason in capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "a text"]) == 2
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="later ones"):
        model(torch.arange(4)[None], cache=model.empty_cache())


@relatives
def test_recomputed_it_computes_the_same(relative):
    tokens, gradients = torch.arange(20).view(2, 10), []
    for recompute in (False, True, ("attention", "ffn")):
        model = built(relative, recompute=recompute).double()
        output = model(**inputs(model, tokens))
        (output.logits.square().mean() + sum(output.aux_losses.values())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        for recomputed in gradients[1:]:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shrunk_it_makes_the_same_choices(file):
    config = load_config(file)
    small = shrink(config, 1).model
    assert type(small.attention) is type(config.model.attention)
    assert type(small.ffn) is type(config.model.ffn)


def test_a_router_per_task_asks_for_the_task(tmp_path, capsys):
    folder, text = tmp_path / "runs" / "it", tmp_path / "valid"
    make_run(folder, built("mod_squad"))
    prepare_text(text, tokenizer=folder.parent / "tokenizer.json", length=12)
    evaluate = ["eval", str(folder), "--data", str(text), "--json"]
    generate = ["generate", str(folder), "--prompt", "a", "--tokens", "3"]
    with one_thread():
        for command in (evaluate, generate):
            assert main(command) == ExitCode.USER
            assert "--task" in capsys.readouterr().err
            assert main([*command, "--task", "3"]) == ExitCode.USER
            capsys.readouterr()
            printed = []
            for task in ("0", "1"):
                assert main([*command, "--task", task]) == 0
                printed.append(capsys.readouterr().out)
            assert printed[0] != printed[1] or command is generate


@pytest.mark.parametrize("relative", ["monet", "monet_vertical"])
def test_choices_that_see_later_tokens_are_marked_and_have_no_cache(relative):
    config = config_of(relative)
    assert any("model.ffn.router" in note for note in objective_notes(config))
    model = build_model(config.model, seed=3)
    with pytest.raises(ValueError, match="later tokens"):
        model(torch.arange(6)[None], cache=model.empty_cache())
    # Evaluated, a token does not see what follows.
    tokens = torch.arange(20).view(2, 10)
    whole, start = (model.eval()(t).logits for t in (tokens, tokens[:, :6]))
    torch.testing.assert_close(start, whole[:, :6], rtol=1e-5, atol=1e-5)


def test_only_such_choices_are_marked():
    assert not list(objective_notes(config_of("remoe")))
