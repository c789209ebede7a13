"""A dense model made sparse says what it said, where the method can promise that."""

import re

import pytest
import torch

from moa_dist.cli.main import main
from moa_dist.config import load_config, to_yaml
from moa_dist.config.model import ModelConfig
from moa_dist.evaluate.trained import load_trained
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.mask import AttentionMask
from moa_dist.transfer.upcycle import upcycle
from moa_dist.transfer.upcycle_checks import problems_of
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


def moh(*arguments: object, **more: object) -> dict:
    return moa(*arguments) | {"kind": "moh"} | more


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
    "moh": {"attention": moh(4, 2, "sigmoid")},
    "moh, all chosen": {"attention": moh(4, 4, "softmax", "raw")},
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


def make_dense(seed: int = 1, **more) -> LanguageModel:
    model = build_model(ModelConfig.model_validate(DENSE | more)).double().eval()
    randomize(model, seed)
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


SOFT = {"attention": moh(4, 4, "softmax", "raw"), "ffn": moe(24, 4, 4, "softmax", "raw")}
"""What BAM starts from dense models: every token takes all, weighted by a softmax."""
OF_SEVERAL = {
    "soft": SOFT,
    "soft, keys and values shared": SOFT | {"attention": moa(4, 4, "softmax", "raw")},
    "chosen": {"attention": switchhead(4, 2, "sigmoid"), "ffn": moe(8, 12, 6, "softmax")},
}


@pytest.mark.parametrize("objective", ["causal", "translation"])
@pytest.mark.parametrize("changes", OF_SEVERAL.values(), ids=OF_SEVERAL)
def test_of_equal_models_the_function_is_preserved(changes, objective):
    dense, other = (make_dense(objective=objective) for _ in range(2))
    config = ModelConfig.model_validate(DENSE | {"objective": objective} | changes)
    assert list(problems_of(dense.config, config, [other.config])) == []
    model, parts = upcycle(dense, config, others=[other])
    assert all(part.exact for part in parts)
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_of_several_models_experts_are_theirs_and_the_rest_is_their_mean():
    """BAM by its definition: each layer sums its models' attention and FFNs, weighted softly."""
    dense = [make_dense(seed) for seed in (1, 2)]
    config = ModelConfig.model_validate(DENSE | SOFT)
    model, _ = upcycle(dense[0], config, others=dense[1:])
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    for layer, *theirs in zip(model.stack.layers, *(d.stack.layers for d in dense), strict=True):
        p = (x @ layer.attention.router.logits.weight.T).softmax(-1).unbind(-1)
        ys = [each.attention(x, x, x, AttentionMask(causal=True)).y for each in theirs]
        expected = sum(p[e][..., None] * ys[e % 2] for e in range(4))
        found = layer.attention(x, x, x, AttentionMask(causal=True)).y
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        p = (x @ layer.ffn.router.logits.weight.T).softmax(-1).unbind(-1)
        ys = [each.ffn(x, x, None).y for each in theirs]
        expected = sum(p[e][..., None] * ys[e % 2] for e in range(4))
        torch.testing.assert_close(layer.ffn(x, x, None).y, expected, rtol=1e-10, atol=1e-10)
    mean = (dense[0].embedding.weight + dense[1].embedding.weight) / 2
    assert torch.equal(model.embedding.weight, mean)


def test_slices_of_several_models_stay_together():
    """A token that takes one group takes the FFN of one model, whole."""
    dense = [make_dense(seed) for seed in (1, 2)]
    config = ModelConfig.model_validate(DENSE | {"ffn": moe(8, 6, 3, "softmax")})
    model, _ = upcycle(dense[0], config, others=dense[1:])
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    for layer, *theirs in zip(model.stack.layers, *(d.stack.layers for d in dense), strict=True):
        group = (x @ layer.ffn.router.logits.weight[::3].T).argmax(-1)
        first, second = (each.ffn(x, x, None).y for each in theirs)
        expected = first.where(group[..., None] == 0, second)
        torch.testing.assert_close(layer.ffn(x, x, None).y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"attention": moh(3, 3, "softmax")}, ("model.attention.router.num_experts",)),
        ({"ffn": moe(24, 3, 2, "softmax")}, ("model.ffn.d_expert", "model.ffn.router.num_experts")),
    ],
)
def test_every_model_gives_as_many_experts(changes, keys):
    config = ModelConfig.model_validate(DENSE | changes)
    (problem,) = problems_of(SOURCE, config, [SOURCE])
    assert problem.keys == keys


@pytest.mark.parametrize(
    ("source", "changes", "key"),
    [
        ({}, {"attention": moa(5, 2, "softmax", attend="stick_breaking")}, "attention.attend"),
        ({"ffn": DENSE["ffn"] | {"bias": True}}, {"ffn": moe(24, 4, 2, "softmax")}, "ffn.bias"),
    ],
)
def test_what_a_copy_does_not_compute_is_refused(source, changes, key):
    dense = ModelConfig.model_validate(DENSE | source)
    problems = problems_of(dense, ModelConfig.model_validate(DENSE | changes))
    assert (f"model.{key}",) in [problem.keys for problem in problems]


def test_models_of_several_architectures_are_refused():
    config = ModelConfig.model_validate(DENSE | SOFT)
    other = ModelConfig.model_validate(DENSE | {"ffn": {"kind": "dense", "d_ff": 48}})
    (problem,) = problems_of(SOURCE, config, [other])
    assert problem.keys == ("model.ffn",)


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


def test_command_with_several_runs(tmp_path, capsys):
    dense = [make_dense(seed).float() for seed in (1, 2)]
    names = ("first", "second")
    configs = [make_run(tmp_path / n, m) for n, m in zip(names, dense, strict=True)]
    changes = {"name": "bam", "model": ModelConfig.model_validate(DENSE | SOFT)}
    file = tmp_path / "bam.yaml"
    file.write_text(to_yaml(configs[0].model_copy(update=changes)))
    first, second = (str(tmp_path / name) for name in names)
    assert main(["upcycle", first, str(file), "--with", second, "train.seed=5"]) == 0
    expected = upcycle(dense[0], changes["model"], others=dense[1:], seed=5)[0].state_dict()
    trained = load_trained(tmp_path / "bam").model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    (tmp_path / "second" / "tokenizer.json").write_text("{}")
    assert main(["upcycle", first, str(file), "--with", second, "name=other"]) != 0
    assert not (tmp_path / "other").exists()
