"""A model and its JetMoE in transformers say the same, either way; others are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, JetMoeConfig, JetMoeForCausalLM

import moa_dist
from moa_dist.checkpoint.check import damage
from moa_dist.cli.main import main
from moa_dist.config import load_config
from moa_dist.config.model import ModelConfig
from moa_dist.data.tokenizer import load_tokenizer
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.transfer.jetmoe import entries, problems_of_model
from tests.data.test_foreign_tokenizers import llama_like
from tests.transfer.jetmoes import batch, make_jetmoe
from tests.transfer.runs import LENGTH, VOCABULARY, make_run, randomize

CONFIGS = Path(__file__).parents[2] / "configs"
ROUTER = {"num_experts": 4, "top_k": 2, "score": "softmax", "gate": "renormalized"}
OURS = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "num_layers": 4,
    "num_distinct_layers": 2,
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "head_bias": False,
    "attention": {
        "kind": "moa",
        "d_head": 6,
        "heads_per_expert": 3,
        "rope": {"fraction": 1.0},
        "router": ROUTER,
    },
    "ffn": {
        "kind": "moe",
        "d_expert": 10,
        "gated": True,
        "activation": "silu",
        "output_bias": True,
        "router": ROUTER,
    },
}


@torch.no_grad()
def assert_equal(ours: LanguageModel, theirs: JetMoeForCausalLM) -> None:
    """Up to what transformers computes in fp32 even of a model in fp64: norms and angles."""
    tokens, real = batch()
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 2e-6)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        for padded in (None, real):
            mask = None if padded is None else padded.long()
            shown = slice(None) if padded is None else padded
            expected = theirs(tokens, attention_mask=mask).logits[shown]
            found = ours(tokens, padded).logits[shown]
            assert expected.std() > 0.5
            deviation = (found - expected).abs().max() / expected.abs().max()
            assert deviation < bound


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_import_says_the_same(tmp_path, capsys, tied, max_shard_size):
    theirs = make_jetmoe(tmp_path / "jetmoe", max_shard_size, tie_word_embeddings=tied)
    assert (tmp_path / "jetmoe/model.safetensors").exists() == (max_shard_size == "5GB")
    run = tmp_path / "run"
    assert main(["import", "jetmoe", str(tmp_path / "jetmoe"), str(run), "train.steps=7"]) == 0
    assert str(run) in capsys.readouterr().out
    assert damage(run / "step-00000000") == []
    config = load_config(run / "config.yaml")
    assert config.train.steps == 7
    assert config.data.sequence_length == LENGTH
    assert config.model.ffn.router.balance.z_loss == pytest.approx(0.001)
    assert_equal(moa_dist.load_model(run), theirs)
    assert main(["generate", str(run), "--prompt", "the cat", "--tokens", "3"]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_export_says_the_same(tmp_path, capsys, tied):
    """Export a model with shared layers and an attention without a bias."""
    ours = build_model(ModelConfig.model_validate(OURS | {"tie_embeddings": tied})).eval()
    randomize(ours)
    make_run(tmp_path / "run", ours)
    target = str(tmp_path / "jetmoe")
    assert main(["export", str(tmp_path / "run"), target, "--format", "jetmoe"]) == 0
    assert "JetMoeForCausalLM.from_pretrained" in capsys.readouterr().out
    theirs, report = JetMoeForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert_equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("the cat sat").input_ids) == "the cat sat"


def test_there_and_back_in_bf16(tmp_path):
    """Values that bf16 holds come back bit for bit."""
    make_jetmoe(tmp_path / "a")
    for name, tensor in (tensors := load_file(tmp_path / "a/model.safetensors")).items():
        tensors[name] = tensor.bfloat16()
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    assert main(["import", "jetmoe", str(tmp_path / "a"), str(tmp_path / "run")]) == 0
    command = ["export", str(tmp_path / "run"), str(tmp_path / "b"), "--format", "jetmoe"]
    assert main([*command, "--dtype", "bf16"]) == 0
    again = load_file(tmp_path / "b/model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    saved = json.loads((tmp_path / "b/config.json").read_text())
    before = json.loads((tmp_path / "a/config.json").read_text())
    for name in saved.keys() - {"bos_token_id", "eos_token_id", "dtype"}:
        assert saved[name] == before[name], name


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"activation_function": "tanh"}, ["activation_function", "tanh", "relu"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope_type", "linear"]),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, ["rope_type", "yarn"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["rope_type", "linear"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ({"num_experts_per_tok": 1}, ["router.gate", "renormalized_detached"]),
        ({"num_experts_per_tok": 5}, ["router.top_k", "5", "4"]),
        ({"model_type": "llama"}, ["config.json", "model_type", "jetmoe"]),
        ({"hidden_size": 18}, ["model.embed_tokens.weight", "(270, 16)", "(270, 18)"]),
        ({"num_hidden_layers": 3}, ["model.layers.2"]),
        ({"num_hidden_layers": 1}, ["model.layers.1"]),
    ],
)
def test_import_refuses_what_it_cannot_express(tmp_path, capsys, changes, names):
    make_jetmoe(tmp_path / "jetmoe")
    file = tmp_path / "jetmoe/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(["import", "jetmoe", str(tmp_path / "jetmoe"), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damaged", ["cut", "missing", "only pickles", "no folder"])
def test_import_refuses_damaged_folders(tmp_path, capsys, damaged):
    make_jetmoe(tmp_path / "jetmoe")
    file = tmp_path / "jetmoe/model.safetensors"
    if damaged == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damaged == "missing":
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file)
    elif damaged == "only pickles":
        file.rename(tmp_path / "jetmoe/pytorch_model.bin")
    else:
        (tmp_path / "jetmoe").rename(tmp_path / "elsewhere")
    assert main(["import", "jetmoe", str(tmp_path / "jetmoe"), str(tmp_path / "run")]) == 2
    assert str(tmp_path / "jetmoe") in capsys.readouterr().err


def test_import_without_a_tokenizer_of_ours_says_so(tmp_path, capsys):
    make_jetmoe(tmp_path / "jetmoe")
    (tmp_path / "jetmoe/tokenizer.json").unlink()
    assert main(["import", "jetmoe", str(tmp_path / "jetmoe"), str(tmp_path / "run")]) == 0
    assert str(tmp_path / "jetmoe/tokenizer.json") in capsys.readouterr().out
    assert not (tmp_path / "run/tokenizer.json").exists()


@pytest.mark.parametrize("named_by", ["the folder", "the user"])
def test_a_jetmoe_with_a_tokenizer_of_llama_can_be_evaluated(tmp_path, capsys, named_by):
    source, run, data = (str(tmp_path / name) for name in ("jetmoe", "run", "data"))
    make_jetmoe(tmp_path / "jetmoe", vocab_size=400)
    llama_like(tmp_path / "jetmoe")
    if named_by == "the folder":
        (tmp_path / "jetmoe/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    end = [] if named_by == "the folder" else ["--end-of-document", "</s>"]
    assert main(["import", "jetmoe", source, run, *end]) == 0
    assert load_tokenizer(tmp_path / "run").end_token == "</s>"
    (tmp_path / "text.txt").write_text("The ship sails.\n\n" * 200)
    options = ["--tokenizer", source, *end, "--sequence-length", str(LENGTH)]
    assert main(["prepare", "--input", str(tmp_path / "text.txt"), "--output", data, *options]) == 0
    capsys.readouterr()
    assert main(["eval", run, "--data", data, "--sequences", "4"]) == 0
    assert f"{4 * LENGTH} tokens" in capsys.readouterr().out


def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_left_out(tmp_path, capsys):
    make_jetmoe(tmp_path / "jetmoe", vocab_size=VOCABULARY)
    used = load_tokenizer(llama_like(tmp_path / "jetmoe"), "</s>")
    assert used.vocab_size > VOCABULARY
    folders = [str(tmp_path / "jetmoe"), str(tmp_path / "run")]
    (tmp_path / "jetmoe/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert main(["import", "jetmoe", *folders]) == 0
    out = capsys.readouterr().out
    assert all(str(number) in out for number in (used.vocab_size, VOCABULARY))
    assert not (tmp_path / "run/tokenizer.json").exists()
    (tmp_path / "run/tokenizer.json").write_text(used.to_json())
    assert main(["generate", folders[1], "--prompt", "The"]) == 2
    assert str(used.vocab_size) in capsys.readouterr().err


def test_import_refuses_an_end_of_document_that_the_tokenizer_does_not_have(tmp_path, capsys):
    make_jetmoe(tmp_path / "jetmoe")
    folders = [str(tmp_path / "jetmoe"), str(tmp_path / "run")]
    assert main(["import", "jetmoe", *folders, "--end-of-document", "</s>"]) == 2
    assert "</s>" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_model_of_the_folder_stays(tmp_path, capsys):
    make_jetmoe(tmp_path / "jetmoe")
    folders = [str(tmp_path / "jetmoe"), str(tmp_path / "run")]
    assert main(["import", "jetmoe", *folders, "model.norm_eps=1"]) == 2
    assert "`model`" in capsys.readouterr().err


SLOWER = {"fraction": 1.0, "scaling": {"kind": "linear", "factor": 2.0}}
LIMIT = {"num_groups": 2, "top_groups": 1}


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"norm_placement": "peri"}, "norm_placement", ["peri", "pre"]),
        ({"norm_eps": 1e-5}, "norm_eps", ["1e-05"]),
        ({"head_bias": True}, "head_bias", ["True"]),
        ({"position": "sinusoidal"}, "position", ["sinusoidal"]),
        ({"scale_embeddings": True}, "scale_embeddings", ["True"]),
        ({"sharing": {"own": ["norms"]}}, "sharing", []),
        ({"coda": 2}, "coda", ["2"]),
        ({"objective": "masked"}, "objective", ["masked", "causal"]),
        ({"objective": "translation"}, "objective", ["translation"]),
        ({"attention": OURS["attention"] | {"rope": {"fraction": 0.5}}}, "attention.rope", []),
        (
            {"attention": {"kind": "dense", "num_heads": 2, "d_head": 8}},
            "attention.kind",
            ["dense", "moa"],
        ),
        ({"ffn": {"kind": "dense", "d_ff": 8}}, "ffn.kind", ["dense", "moe"]),
        ({"ffn": OURS["ffn"] | {"gated": False}}, "ffn.gated", []),
        ({"ffn": OURS["ffn"] | {"router": ROUTER | {"gate": "raw"}}}, "ffn.router", ["raw"]),
        (
            {"ffn": OURS["ffn"] | {"router": ROUTER | {"num_experts": 5}}},
            "ffn.router.num_experts",
            ["`model.attention.router.num_experts`", "4", "5"],
        ),
        (
            {"ffn": OURS["ffn"] | {"router": ROUTER | {"capacity": {"factor": 1}}}},
            "ffn.router.capacity",
            [],
        ),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap", ["30"]),
        ({"recursion": {"kind": "token_choice"}}, "recursion", []),
        ({"attention": OURS["attention"] | {"soft_cap": 50.0}}, "attention.soft_cap", []),
        ({"attention": OURS["attention"] | {"window": {"size": 8}}}, "attention.window", []),
        ({"attention": OURS["attention"] | {"shared_experts": 1}}, "attention.shared_experts", []),
        ({"attention": OURS["attention"] | {"rope": SLOWER}}, "attention.rope.scaling", []),
        ({"ffn": OURS["ffn"] | {"shared_expert": {"d_expert": 8}}}, "ffn.shared_expert", []),
        ({"ffn": OURS["ffn"] | {"router": ROUTER | {"route_scale": 2.0}}}, "ffn.router", []),
        ({"ffn": OURS["ffn"] | {"router": ROUTER | {"group_limit": LIMIT}}}, "ffn.router", []),
        (
            {"ffn": OURS["ffn"] | {"router": ROUTER | {"balance": {"bias_rate": 0.1}}}},
            "ffn.router.balance.bias_rate",
            [],
        ),
    ],
)
def test_export_refuses_what_jetmoe_cannot_express(changes, key, values):
    (problem,) = problems_of_model(ModelConfig.model_validate(OURS | changes))
    assert all(value in problem for value in [f"`model.{key}`", *values]), problem


def test_a_refused_export_names_every_reason(tmp_path, capsys):
    model = build_model(ModelConfig.model_validate(OURS | {"norm_eps": 1e-5, "head_bias": True}))
    make_run(tmp_path / "run", model)
    command = ["export", str(tmp_path / "run"), str(tmp_path / "jetmoe"), "--format", "jetmoe"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "2 problems" in error
    assert "`model.norm_eps`" in error
    assert "`model.head_bias`" in error
    assert not (tmp_path / "jetmoe").exists()


def test_a_model_of_documents_is_no_jetmoe(tmp_path, capsys):
    make_run(tmp_path / "run", build_model(ModelConfig.model_validate(OURS)), apart=True)
    command = ["export", str(tmp_path / "run"), str(tmp_path / "jetmoe"), "--format", "jetmoe"]
    assert main(command) == 2
    assert "`data.document_attention`" in capsys.readouterr().err


def test_jetmoe_8b_has_the_parameters_of_transformers():
    model = load_config(CONFIGS / "jetmoe/8b.yaml").model
    assert list(problems_of_model(model)) == []
    with torch.device("meta"):
        ours = LanguageModel(model)
        theirs = JetMoeForCausalLM(JetMoeConfig(num_hidden_layers=24))
    expected = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == expected
    assert {e.theirs for e in entries(model)} == dict(theirs.named_parameters()).keys()
