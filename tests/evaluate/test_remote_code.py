"""transformers computes the same with an export, where this package is not installed."""

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._library.custom_ops import OPDEFS
from transformers import PreTrainedTokenizerFast

from moa_dist import __version__, load_model
from moa_dist.config import load_config
from moa_dist.config.model import ModelConfig
from moa_dist.config.recipe import shipped_recipes
from moa_dist.config.shrink import shrink
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.evaluate.export import export
from moa_dist.evaluate.generate import generate
from moa_dist.evaluate.remote_code import generate_code
from moa_dist.evaluate.sampling import Sampling
from moa_dist.evaluate.transformers_files import is_for_transformers, unsupported
from moa_dist.models.language_model import build_model, dropless
from tests.data.test_foreign_tokenizers import llama_like
from tests.evaluate.without_package import NEW_TOKENS, TASKS, TEXT, read_elsewhere, tokens_for
from tests.models.small import ATTENTION, FFN, PLACEMENTS, router, small_config, with_capacity
from tests.transfer.runs import VOCABULARY, make_run, randomize

BIASED = router(4, 2, balance={"bias_rate": 0.1})
SHAPES = {
    "dense": {
        "attention": ATTENTION["dense"] | {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
        "ffn": "dense gated",
        "norm": "rmsnorm",
        "tie_embeddings": True,
        "head_bias": False,
    },
    "moe": {"ffn": "moe gated", "position": "sinusoidal", "scale_embeddings": True},
    "moa": {"attention": "moa", "norm_placement": "post"},
    "universal": {
        "attention": "switchhead",
        "num_layers": 4,
        "num_distinct_layers": 2,
        "norm_placement": "peri",
    },
    "like JetMoE": {
        "attention": ATTENTION["moa"]
        | {"router": router(4, 2, "softmax", gate="renormalized"), "output_bias": True},
        "ffn": FFN["moe gated"] | {"output_bias": True},
        "norm": "rmsnorm",
        "final_norm_eps": 1e-6,
    },
    "biased": {"attention": "moa", "ffn": FFN["moe"] | {"router": BIASED}},
    "capacity by position": with_capacity("position"),
    "capacity by probability": with_capacity("probability"),
    "recursion by tokens, and tasks": {
        "num_layers": 8,
        "prelude": 1,
        "coda": 1,
        "num_distinct_layers": 2,
        "recursion": {"kind": "token_choice"},
        "ffn": FFN["moe"] | {"router": router(4, 2, "softmax", kind="task", tasks=2)},
    },
    "recursion by experts": {
        "num_layers": 4,
        "num_distinct_layers": 2,
        "recursion": {"kind": "expert_choice", "capacity": [0.8, 0.4]},
    },
}


def exported(folder: Path, model_config: ModelConfig) -> Path:
    """An export of a model with random weights and biases; next to it lies its run."""
    model = build_model(model_config)
    randomize(model)
    for name, buffer in model.named_buffers():
        lowest = 0.5 if name.endswith("variance") else -1
        buffer.copy_(torch.linspace(lowest, 1, buffer.numel()).view(buffer.shape))
    run = folder.with_suffix(".run")
    make_run(run, model)
    export(run / "step-00000000", folder)
    return folder


def require_equal(folder: Path, ids: list[int]) -> None:
    model, found = dropless(load_model(folder)), load_file(f"{folder}.read.safetensors")
    tokens = tokens_for(model.config.vocab_size)
    logits = model(tokens, tasks=torch.tensor(TASKS)).logits
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
    assert torch.equal(found["saved again"], found["logits"])
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    assert ids == tokenizer.encode(TEXT)
    if model.config.looks_ahead:
        assert not found.keys() & {"cached", "uncached"}
        return
    assert torch.equal(found["cached"], found["uncached"])
    end = tokenizer.end_of_document
    for row, prompt, task in zip(found["cached"].tolist(), tokens.tolist(), TASKS, strict=True):
        drawn = generate(
            model,
            [prompt],
            Sampling(temperature=0.0),
            max_new_tokens=NEW_TOKENS,
            seed=0,
            end_of_document=end,
            max_length=99,
            task=task,
        )
        ours = prompt + [token for _, token in drawn]
        assert row[: len(ours)] == ours
        assert set(row[len(ours) :]) <= {end}


def test_every_shape_computes_the_same_without_the_package(tmp_path):
    shapes = {"vocab_size": VOCABULARY}
    folders = [
        exported(tmp_path / f"shape{i}", small_config(**(shapes | fields)))
        for i, fields in enumerate(SHAPES.values())
    ]
    for folder, ids in zip(folders, read_elsewhere(folders), strict=True):
        require_equal(folder, ids)


@pytest.mark.full
def test_every_shipped_model_computes_the_same_without_the_package(tmp_path):
    models = {}
    for path in shipped_recipes().values():
        config = shrink(load_config(path), 1)
        if unsupported(config) is None:
            model = config.model.model_copy(update={"vocab_size": VOCABULARY})
            models[model.model_dump_json()] = model
    assert len(models) > len(PLACEMENTS) * len(ATTENTION)
    folders = [exported(tmp_path / f"recipe{i}", m) for i, m in enumerate(models.values())]
    for folder, ids in zip(folders, read_elsewhere(folders), strict=True):
        require_equal(folder, ids)


def test_the_code_imports_what_comes_with_torch_and_transformers():
    allowed = {"torch", "transformers", "triton", "pydantic", *sys.stdlib_module_names}
    files = generate_code()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found = {alias.name.partition(".")[0] for alias in node.names}
                assert found <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{module}.py" for module in modules} <= files.keys(), name
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed, name
    assert not any("moa_dist_train" in name or "collectives" in name for name in files)


def test_every_file_can_be_imported_next_to_the_package(tmp_path, monkeypatch):
    """Those for GPUs, too, which are imported on first use: operators have names of their own."""
    pytest.importorskip("triton", reason="in the extra `dev`")
    folder = tmp_path / "generated_for_test"
    folder.mkdir()
    files = generate_code()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(OPDEFS)
    modules = [import_module(f"{folder.name}.{name.removesuffix('.py')}") for name in files]
    assert len(modules) == len(files)
    names = {name.removeprefix("moa_dist::") for name in before if name.startswith("moa_dist::")}
    new = {name for name in set(OPDEFS) - before if name.startswith("moa_dist")}
    assert {name.partition("::")[2] for name in new} == names
    assert names


def test_the_code_names_its_version():
    for text in generate_code().values():
        assert __version__ in text.partition("\n")[0]
        ast.parse(text)


@pytest.mark.parametrize("obstacle", ["masked", "documents"])
def test_what_transformers_cannot_run_is_exported_without_code(tmp_path, obstacle):
    model = build_model(
        small_config(
            vocab_size=VOCABULARY, objective="masked" if obstacle == "masked" else "causal"
        )
    )
    make_run(tmp_path / "run", model, apart=obstacle == "documents")
    export(tmp_path / "run/step-00000000", tmp_path / "out")
    assert not is_for_transformers(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_tokenizer_of_others_adds_nothing_to_a_text(tmp_path):
    """Its file had transformers begin every text with a token; training never did."""
    ours = load_tokenizer(llama_like(tmp_path), "</s>")
    exported(tmp_path / "first", small_config(vocab_size=ours.vocab_size))
    run = tmp_path / "first.run"
    (run / TOKENIZER_FILE).write_text(ours.to_json())
    export(run / "step-00000000", tmp_path / "out")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs("the ship").input_ids == ours.encode("the ship")
    assert theirs.eos_token_id == ours.end_of_document


@pytest.mark.full
def test_weights_in_bf16_are_loaded_as_such(tmp_path):
    exported(tmp_path / "first", small_config("moa", vocab_size=VOCABULARY))
    export(tmp_path / "first.run/step-00000000", tmp_path / "out", torch.bfloat16)
    read_elsewhere([tmp_path / "out"])
    found = load_file(f"{tmp_path / 'out'}.read.safetensors")["logits"]
    assert found.dtype == torch.bfloat16
    expected = load_model(tmp_path / "out")(tokens_for(VOCABULARY)).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
