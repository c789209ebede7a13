"""YAML, `extends` and overrides become one configuration; every mistake is named at once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from moa_dist.config import load_config, to_yaml
from moa_dist.config.attention import AttentionConfig
from moa_dist.config.schema import describe, walk
from moa_dist.errors import ConfigError


def test_two_typos_and_an_impossible_combination_are_three_messages(write, base, problems):
    path = write(
        "extends: base.yaml\ntrain:\n  prescision: bf16\nlr: 1e-3\nmodel: {num_layers: 7}\n"
    )
    found = problems(path)
    assert len(found) == 3
    assert found[1].suggestions == {"train.prescision": ("train.precision",)}
    assert found[0].suggestions == {"lr": ("optimizer.lr",)}
    assert found[2].keys == ("model.num_distinct_layers", "model.num_layers")


def test_misspelled_required_key_is_one_message_and_still_checked(write, base, problems):
    path = write(Path(base).read_text().replace("num_layers: 4", "num_layer: 5"))
    found = problems(path)
    unknown, checked = found
    assert unknown.suggestions == {"model.num_layer": ("model.num_layers",)}
    assert checked.suggestions == {"model.num_distinct_layers": [1, 5]}


def test_each_problem_names_its_source(write, base, problems):
    write("extends: base.yaml\ntrain:\n  micro_batch: 3\n", "middle.yaml")
    path = write("extends: middle.yaml\nnaem: x\nmodel:\n  d_model: wide\n")
    found = problems(path, "train.steps=soon")
    assert [[str(source) for source in p.sources] for p in found] == [
        ["run.yaml:2"],
        ["run.yaml:4"],
        ["override `train.steps=soon`"],
        ["base.yaml:23", "middle.yaml:3"],
    ]


def test_missing_fields_are_all_named(write, problems):
    found = problems(write("model: {d_model: 3}\n"))
    for path in ("name", "model.vocab_size", "model.attention", "data", "train"):
        assert any(p.keys == (path,) for p in found), path
    assert not any("d_model" in str(p) for p in found)


def test_other_checks_run_beside_an_unusable_value(base, problems):
    stage, batch = problems(base, "parallel.zero_stage=none", "train.micro_batch=3")
    assert stage.keys == ("parallel.zero_stage",)
    assert batch.keys == ("train.global_batch", "train.micro_batch")


def test_check_on_an_unusable_field_is_left_out(base, problems):
    # With the default kind, adamw, the momentum would be a second problem.
    (found,) = problems(base, "optimizer.kind=lion", "optimizer.momentum=0.9")
    assert found.keys == ("optimizer.kind",)


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("model.attention.router.topk=1", ["model.attention.router.top_k"]),
        ("model.attention.kind=swichhead", ["switchhead"]),
        ("model.attention.kind=banana", None),
        ("top_k=1", ["model.attention.router.top_k", "model.ffn.router.top_k"]),
        ("model.ffn.d_ff=64", ["dense", "residual_moe"]),  # the kinds that have it
        ("zzz=1", []),
        ("train.steps=true", None),
        ("train.steps='5'", None),
        ("train.steps=0", None),
        ("train.steps=2.5", None),
        ("optimizer.lr=.inf", None),
        ("optimizer.lr=.nan", None),
        ("optimizer.betas=[0.9]", None),
        ("checkpoint.asynchronous=yes", None),
        ("logging.trackers=[wand]", None),
        ("name=3", None),
        ("train=3", None),
        ("train.seed={a: 1}", None),
        ("model.attention.rope.fraction=2", None),
    ],
)
def test_one_mistake_is_one_problem(base, problems, override, suggested):
    (found,) = problems(base, override)
    key = override.partition("=")[0]
    assert found.keys == (key,)
    assert found.suggestions == ({} if suggested is None else {key: tuple(suggested)})
    assert [str(source) for source in found.sources] == [f"override `{override}`"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.steps", "an integer of at least 1"),
        ("optimizer.lr", "a number above 0"),
        ("model.attention.rope.fraction", "a number above 0 and at most 1"),
        ("optimizer.betas", "a list of 2 numbers"),
        ("optimizer.clip_norm", "a number above 0, or null"),
        ("checkpoint.asynchronous", "true or false"),
        ("name", "text"),
        ("train", "a section"),
        ("model.attention", f"a section, its kind one of {', '.join(AttentionConfig.kinds)}"),
    ],
)
def test_allowed_values_are_described_in_the_message(base, problems, key, words):
    """The description is the product here: `moa-dist config fields` prints it, too."""
    (found,) = problems(base, f"{key}=[]")
    assert words in found.text
    assert words in {describe(field.info) for field in walk() if field.path == key}


def test_numbers_in_exponent_form(base):
    config = load_config(base, ["optimizer.lr=1e-4", "train.steps=1e5", "optimizer.eps=1E-8"])
    assert config.optimizer.lr == 0.0001
    assert config.train.steps == 100_000
    assert config.optimizer.eps == 1e-8


def test_later_files_and_overrides_win(write, base):
    write("train: {steps: 5, seed: 5}\nname: fragment\n", "fragment.yaml")
    path = write("extends: [base.yaml, fragment.yaml]\ntrain: {seed: 6}\n")
    config = load_config(path, ["train.micro_batch=2"])
    assert (config.name, config.train.steps, config.train.seed) == ("fragment", 5, 6)
    assert (config.train.micro_batch, config.train.global_batch) == (2, 8)


def test_extends_is_relative_to_the_file_it_stands_in(write, base, tmp_path):
    (tmp_path / "deep").mkdir()
    write("extends: ../base.yaml\nname: deep\n", "deep/run.yaml")
    assert load_config("deep/run.yaml").name == "deep"
    assert load_config(tmp_path / "deep" / "run.yaml").model.d_model == 32


def test_another_kind_replaces_the_section_and_the_same_kind_merges(write, base):
    path = write(
        "extends: base.yaml\nmodel:\n"
        "  attention: {kind: dense, num_heads: 3, d_head: 8}\n"
        "  ffn: {kind: moe, router: {top_k: 3}}\n"
    )
    model = load_config(path).model
    assert (model.attention.kind, model.attention.num_heads) == ("dense", 3)
    assert (model.ffn.router.top_k, model.ffn.router.num_experts) == (3, 8)


def test_misspelled_kind_of_a_replaced_section_is_one_message(write, base, problems):
    path = write("extends: base.yaml\nmodel: {ffn: {kind: dence, d_ff: 3}}\n")
    (found,) = problems(path)
    assert found.suggestions == {"model.ffn.kind": ("dense",)}


def test_another_optimizer_keeps_the_learning_rate(base):
    optimizer = load_config(base, ["optimizer={kind: adamw, lr: 0.5}", "optimizer.kind=sgd"])
    assert optimizer.optimizer.lr == 0.5


def test_order_of_overrides_does_not_matter_for_a_kind_switch(base):
    overrides = ["model.ffn.d_ff=64", "model.ffn.kind=dense"]
    assert load_config(base, overrides) == load_config(base, overrides[::-1])


def test_null_removes_and_reopens_a_section(write, base):
    path = write("extends: base.yaml\nmodel: {attention: {rope: null}}\n")
    assert load_config(path).model.attention.rope is None
    assert load_config(path, ["model.attention.rope.base=5"]).model.attention.rope.base == 5


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("train.steps", ()),
        ("=3", ()),
        ("train..steps=3", ()),
        ("train.steps.more=3", ("train.steps",)),
        ("train.steps=[1", ()),
        ("train={seed: 1, seed: 2}", ("train.seed",)),
    ],
)
def test_malformed_override(base, problems, override, keys):
    (found,) = problems(base, override)
    assert found.keys == keys
    assert [str(source) for source in found.sources] == [f"override `{override}`"]


def test_circle_of_extends(write, problems):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    (found,) = problems("a.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in found.text
    assert found.sources == (("b.yaml", None),)


def test_duplicate_keys_name_both_lines(write, base, problems):
    path = write(Path(base).read_text() + "name: again\n")
    (found,) = problems(path)
    assert found.keys == ("name",)
    assert found.sources == (("run.yaml", 1), ("run.yaml", 25))


def test_syntax_error_names_file_and_line(write, problems):
    write("name: x\ntrain: [1\ndata: 3\n", "broken.yaml")
    (found,) = problems(write("extends: broken.yaml\n"))
    assert found.sources == (("broken.yaml", 3),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- b\n",
        "extends: {a: b}\n",
        "extends: [1]\n",
        "extends: missing.yaml\n",
        "extends: .\n",
        'extends: "nul\\0.yaml"\n',
        "extends: run.yaml\n",
        "1: x\n",
        "null: x\n",
        "? [a]\n: x\n",
        "? {a: b}\n: x\n",
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "a: *nowhere\n",
        "<<: {a: b}\n",
        "a: !!python/object:os.system x\n",
        "a: !!set {x}\n",
        "a: !!binary aGk=\n",
        "a: 1\n---\nb: 2\n",
        "a: \x07\n",
        'name: "\\uD800"\n',
        "\tname: x\n",
        "name: 2024-01-01\n",
        f"train: {{steps: {'9' * 5000}}}\n",
        f"train: {{steps: {'9' * 400}}}\n",
        "train: {steps: 1e400}\n",
        "train: {steps: 1e300}\n",
        "optimizer: {lr: 1e300, betas: [[], {}]}\n",
        "model: []\n",
        "model: {attention: {kind: [moa]}}\n",
        "model: {attention: {kind: null}}\n",
        "model: {attention: {}, ffn: {kind: moe, router: 3}}\n",
        "model: {attention: {kind: moa, router: null}}\n",
        "'': 1\n",
        "a.b: 1\n",
        "model: {'num_layers.x': 1}\n",
        "[" * 5000,
    ],
)
def test_bad_files_are_configuration_errors_and_nothing_else(write, base, text):
    path = write(text)
    with pytest.raises(ConfigError):
        load_config(path)
    # Likewise over a complete configuration, where such text may happen to be right.
    with contextlib.suppress(ConfigError):
        load_config(write(f"extends: base.yaml\n{text}"))


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    for path in (tmp_path / "bytes.yaml", tmp_path, tmp_path / "absent.yaml", "nul\0", ""):
        with pytest.raises(ConfigError):
            load_config(path)


def test_yaml_round_trip(write, base):
    config = load_config(base, ["optimizer.eps=1e-8", "model.attention.rope=null"])
    assert load_config(write(to_yaml(config), "again.yaml")) == config


def test_configuration_and_its_command_do_not_import_torch(base):
    check = (
        "import sys, moa_dist.config, moa_dist.cli.main as m\n"
        f"assert m.main(['config', 'check', {base!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
