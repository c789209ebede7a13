"""A dense model made sparse says what it said, where the method can promise that."""

import re

import pytest
import torch

from moa_dist.cli.main import main
from moa_dist.config import load_config, to_yaml
from moa_dist.config.model import ModelConfig
from moa_dist.evaluate.trained import load_trained
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.transfer.upcycle import problems_of, upcycle
from tests.config.test_shipped_configs import CONFIGS
from tests.transfer.runs import LENGTH, VOCABULARY, make_run, randomize

DENSE = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "num_layers": 4,
    "num_distinct_layers": 2,
    "attention": {"kind": "dense", "num_heads": 3, "d_head": 8},
    "ffn": {"kind": "dense", "d_ff": 24},
}

SOURCE = ModelConfig.model_validate(DENSE)


def router(num_experts: int, top_k: int, score: str, gate: str = "renormalized", **more):
    return {"num_experts": num_experts, "top_k": top_k, "score": score, "gate": gate, **more}


def moa(*arguments: object, **more: object) -> dict:
    routing = router(*arguments)
    return {"kind": "moa", "heads_per_expert": 3, "d_head": 8, "router": routing} | more


def switchhead(*arguments: object) -> dict:
    return {"kind": "switchhead", "num_heads": 3, "d_head": 8, "router": router(*arguments)}


def moe(d_expert: int, *arguments: object, **more: object) -> dict:
    return {"kind": "moe", "d_expert": d_expert, "router": router(*arguments)} | more


EXACT = {
    "copies": {"ffn": moe(24, 4, 2, "softmax")},
    "copies, one chosen": {"ffn": moe(24, 4, 1, "softmax", "renormalized_detached")},
    "slices, a group chosen": {"ffn": moe(8, 6, 3, "softmax")},
    "slices, two groups chosen": {"ffn": moe(8, 9, 6, "sigmoid")},
    "slices, all chosen": {"ffn": moe(8, 6, 6, "softmax", "raw")},
    "slices and a bias": {"ffn": moe(12, 4, 2, "softmax", output_bias=True)},
    "moa": {"attention": moa(5, 2, "softmax")},
    "moa, all chosen": {"attention": moa(2, 2, "softmax", "raw")},
    "switchhead": {"attention": switchhead(4, 2, "sigmoid")},
    "both": {"attention": moa(5, 2, "sigmoid"), "ffn": moe(4, 12, 6, "softmax")},
}
APPROXIMATE = {
    "sigma-moe, all chosen": ({"ffn": moe(4, 6, 6, "sigmoid", "raw")}, 0.04),
    "sigma-moe, a group chosen": ({"ffn": moe(4, 24, 6, "sigmoid", "raw")}, 0.02),
    "sigma-moe, some slices": ({"ffn": moe(4, 24, 4, "sigmoid", "raw")}, 0.8),
    "switchhead": ({"attention": switchhead(4, 2, "sigmoid", "raw")}, 0.04),
    "moa": ({"attention": moa(5, 2, "softmax", "raw")}, 0.02),
}
"""Changes, and the relative deviation of logits that is acceptable."""


def make_dense(**more) -> LanguageModel:
    model = build_model(ModelConfig.model_validate(DENSE | more)).double().eval()
    randomize(model)
    return model


def logits(model: LanguageModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, 7, LENGTH])[:, None]
    source = None
    if model.encoder is not None:
        source = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    with torch.no_grad():
        return model(tokens, real, None, source, real).logits[real]


@pytest.mark.parametrize("objective", ["causal", "translation"])
@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_the_function_is_preserved(changes, placement, objective):
    same = {"norm_placement": placement, "objective": objective}
    dense = make_dense(**same)
    config = ModelConfig.model_validate(DENSE | same | changes)
    assert list(problems_of(dense.config, config)) == []
    model, parts = upcycle(dense, config)
    assert [part.name for part in parts] == list(changes)
    assert all(part.exact for part in parts)
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_windows_and_caps_stay():
    local = {"window": {"size": 3, "full_every": 2}, "soft_cap": 2.0}
    dense = make_dense(attention=DENSE["attention"] | local)
    config = ModelConfig.model_validate(DENSE | {"attention": moa(5, 2, "softmax", **local)})
    assert list(problems_of(dense.config, config)) == []
    model, _ = upcycle(dense, config)
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("attention", "window", {"size": 3}),
        ("attention", "soft_cap", 2.0),
        ("attention", "shared_experts", 1),
        ("attention", "router.route_scale", 2.0),
        ("ffn", "router.route_scale", 2.0),
        ("ffn", "router.group_limit", {"num_groups": 2, "top_groups": 1}),
        ("ffn", "shared_expert", {"d_expert": 8}),
    ],
)
def test_parts_without_a_counterpart_are_refused(part, field, value):
    section = {"attention": moa(5, 2, "softmax"), "ffn": moe(24, 4, 2, "softmax")}[part]
    name, _, inner = field.partition(".")
    section = section | {name: section[name] | {inner: value} if inner else value}
    config = ModelConfig.model_validate(DENSE | {part: section})
    (problem,) = problems_of(SOURCE, config)
    assert problem.keys == (f"model.{part}.{field}",)


@pytest.mark.parametrize("gated", [False, True])
def test_gated_experts(gated):
    more = {"gated": gated, "activation": "silu"}
    dense = make_dense(ffn=DENSE["ffn"] | more)
    config = ModelConfig.model_validate(DENSE | {"ffn": moe(8, 6, 3, "softmax", **more)})
    expected = logits(dense)
    found = logits(upcycle(dense, config)[0])
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("objective", ["causal", "translation"])
@pytest.mark.parametrize(("changes", "bound"), APPROXIMATE.values(), ids=APPROXIMATE)
def test_where_weights_vary_it_comes_close(changes, bound, objective):
    same = {"objective": objective}
    dense = build_model(ModelConfig.model_validate(DENSE | same)).double().eval()
    config = ModelConfig.model_validate(DENSE | same | changes)
    model, (part,) = upcycle(dense, config)
    assert not part.exact
    expected = logits(dense)
    deviation = (logits(model) - expected).norm() / expected.norm()
    stacks = 1 if model.encoder is None else 2  # each adds its own
    assert 1e-6 < deviation < stacks * bound


def test_routers_are_drawn_and_experts_of_a_group_share_a_row():
    dense = make_dense()
    config = ModelConfig.model_validate(DENSE | {"ffn": moe(8, 6, 3, "softmax")})
    first, again, other = (upcycle(dense, config, seed=s)[0].state_dict() for s in (0, 0, 1))
    rows = first["stack.layers.0.ffn.router.logits.weight"]
    assert torch.equal(rows, again["stack.layers.0.ffn.router.logits.weight"])
    assert not torch.equal(rows, other["stack.layers.0.ffn.router.logits.weight"])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[2], rows[3])


COPIES = ("model.ffn.d_expert", "model.ffn.router.num_experts")


@pytest.mark.parametrize(
    ("changes", "keys", "suggestions", "values"),
    [
        ({}, ("model.attention", "model.ffn"), {}, ()),
        (
            {"ffn": moe(24, 4, 2, "softmax"), "d_model": 32},
            ("model.d_model",),
            {"model.d_model": [16]},
            ("32", "16"),
        ),
        ({"ffn": moe(10, 4, 2, "softmax")}, COPIES, {}, ("4 experts", "width 10", "width 24")),
        ({"ffn": moe(8, 4, 2, "softmax")}, COPIES, {}, ("4 experts", "width 8", "width 24")),
        (
            {"ffn": moe(24, 4, 2, "softmax", activation="silu")},
            ("model.ffn.activation",),
            {"model.ffn.activation": [SOURCE.ffn.activation]},
            ("silu",),
        ),
        (
            {"attention": moa(4, 2, "softmax", heads_per_expert=1)},
            ("model.attention.heads_per_expert",),
            {"model.attention.heads_per_expert": [3]},
            ("1", "3"),
        ),
        (
            {"attention": moa(4, 2, "softmax", rope=None)},
            ("model.attention.rope",),
            {"model.attention.rope": [SOURCE.attention.rope]},
            ("None",),
        ),
        (
            {"ffn": {"kind": "dense", "d_ff": 48}},
            ("model.ffn",),
            {"model.ffn": [SOURCE.ffn]},
            ("dense",),
        ),
    ],
)
def test_what_cannot_be_made_is_refused(changes, keys, suggestions, values):
    config = ModelConfig.model_validate(DENSE | changes)
    (problem,) = problems_of(SOURCE, config)
    assert (problem.keys, problem.suggestions) == (keys, suggestions)
    assert all(value in problem.text for value in values), problem


def test_experts_are_not_made_of_experts():
    sparse = ModelConfig.model_validate(DENSE | {"ffn": moe(24, 4, 2, "softmax")})
    config = ModelConfig.model_validate(DENSE | {"ffn": moe(24, 8, 2, "softmax")})
    (problem,) = problems_of(sparse, config)
    assert (problem.keys, problem.suggestions) == (("model.ffn",), {"model.ffn": [sparse.ffn]})
    assert re.search(r"\bmoe\b", problem.text)


def test_layers_shared_by_part_are_refused():
    shared = {"sharing": {"own": ["norms"]}}
    dense = ModelConfig.model_validate(DENSE | shared)
    config = ModelConfig.model_validate(DENSE | shared | {"ffn": moe(24, 8, 2, "softmax")})
    (problem,) = problems_of(dense, config)
    assert problem.keys == ("model.sharing",)


def test_the_shipped_pair_fits():
    dense, sparse = (load_config(CONFIGS / f"small/{n}.yaml").model for n in ("dense", "upcycled"))
    assert list(problems_of(dense, sparse)) == []
    _, parts = upcycle(build_model(dense), sparse)
    assert all(part.exact for part in parts)


def test_command(tmp_path, capsys):
    dense = make_dense().float()
    config = make_run(tmp_path / "dense", dense)
    changes = {"name": "sparse", "model": ModelConfig.model_validate(DENSE | EXACT["both"])}
    file = tmp_path / "sparse.yaml"
    file.write_text(to_yaml(config.model_copy(update=changes)))
    command = ["upcycle", str(tmp_path / "dense"), str(file)]
    assert main([*command, "train.seed=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (attention,) = [line for line in lines if line.strip().startswith("attention:")]
    (ffn,) = [line for line in lines if line.strip().startswith("ffn:")]
    assert "exact" in attention
    assert all(value in ffn for value in ("6 slices", "2 experts", "exact"))
    trained = load_trained(tmp_path / "sparse")
    assert trained.step == 0
    assert trained.config == load_config(file, ["train.seed=5"])
    expected = logits(dense)
    assert (logits(trained.model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert main(command) == 2
    assert str(tmp_path / "sparse") in capsys.readouterr().err
    assert main([*command, "name=other", "model.d_model=32"]) == 2
    assert "`model.d_model`" in capsys.readouterr().err
