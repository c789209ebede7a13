"""An export behind the interface of transformers says what the model says."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from moa_dist.checkpoint.write import write_sums
from moa_dist.config import to_yaml
from moa_dist.data.manifest import sha256_of
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer, train_tokenizer
from moa_dist.errors import DataError
from moa_dist.evaluate.export import CONFIG_FILE, MODEL_FILE
from moa_dist.evaluate.generate import generate
from moa_dist.evaluate.huggingface import MoaDistForCausalLM
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.language_model import build_model, dropless
from tests.data.test_foreign_tokenizers import llama_like
from tests.evaluate.runs import config
from tests.models.small import ATTENTION, FFN, small_config, tokens_of

WINDOW = {"end_of_document": 0, "max_length": 99}


@pytest.fixture(params=[*ATTENTION, "tied", "biased", "capacity", "local", "shared"])
def exported(request, tmp_path):
    """A model without its capacity, and the folder of its export."""
    more = {"num_layers": 4, "num_distinct_layers": 2, "tie_embeddings": request.param == "tied"}
    section = request.param
    if section == "biased":
        section = ATTENTION["moa"]
        section = section | {"router": section["router"] | {"balance": {"bias_rate": 0.1}}}
    if section == "capacity":
        section = ATTENTION["moa"]
        section = section | {"router": section["router"] | {"capacity": {"factor": 0.5}}}
    if section == "local":
        section = ATTENTION["switchhead"]
        scaling = {"kind": "yarn", "factor": 2.0, "original_length": 8}
        section = section | {"window": {"size": 3, "full_every": 2}, "rope": {"scaling": scaling}}
        section, more = section | {"soft_cap": 2.0}, more | {"logit_soft_cap": 3.0}
    if section == "shared":
        section = ATTENTION["moa"] | {"shared_experts": 2}
        limit = {"num_groups": 2, "top_groups": 1}
        router = FFN["moe"]["router"] | {"group_limit": limit, "route_scale": 2.0}
        shared = {"d_expert": 4, "sigmoid_gate": True}
        more["ffn"] = FFN["moe"] | {"router": router, "shared_expert": shared}
    run = config(tmp_path).model_copy(
        update={"model": small_config("dense" if section == "tied" else section, **more)}
    )
    model = build_model(run.model, seed=5).eval()
    for buffer in model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path / "export"
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / MODEL_FILE,
    )
    write_sums(folder, {MODEL_FILE: sha256_of((folder / MODEL_FILE).read_bytes())})
    (folder / CONFIG_FILE).write_text(to_yaml(run), encoding="utf-8")
    tokenizer = train_tokenizer(["the cat sat on the mat"], 270)
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json())
    return dropless(model), folder


def test_logits_are_equal_there_and_back(exported, tmp_path):
    model, folder = exported
    tokens = tokens_of(2)
    expected = model(tokens).logits
    wrapped = MoaDistForCausalLM.from_export(folder)
    assert torch.equal(wrapped(tokens).logits, expected)
    wrapped.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_generates_what_we_generate(exported, tmp_path, use_cache):
    model, folder = exported
    wrapped, prompts = MoaDistForCausalLM.from_export(folder), tokens_of(2)[:, :4]
    wrapped.save_pretrained(tmp_path / "saved")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    found = wrapped.generate(prompts, **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(prompts, **options), found)
    for row, prompt in zip(found.tolist(), prompts.tolist(), strict=True):
        greedy, tokens = Sampling(temperature=0.0), list(prompt)
        for _, token in generate(model, [prompt], greedy, max_new_tokens=8, seed=0, **WINDOW):
            tokens.append(token)
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {WINDOW["end_of_document"]}


def test_padding_and_labels(exported):
    model, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    output = wrapped(tokens, attention_mask=mask, labels=labels)
    first, second = model(tokens[:1]).logits[0], model(tokens[1:, 3:]).logits[0]
    torch.testing.assert_close(output.logits[1, 3:], second)
    # The first token of the second text is predicted, too: from padding.
    predicted = torch.cat([first[:-1], output.logits[1, 2:3], second[:-1]])
    targets = torch.cat([tokens[0, 1:], tokens[1, 3:]])
    torch.testing.assert_close(output.loss, F.cross_entropy(predicted, targets))


def test_a_cache_replaces_the_tokens_read_before(exported):
    _, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    whole = wrapped(tokens, attention_mask=mask)
    assert whole.cache is None
    first = wrapped(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = wrapped(tokens[:, 5:], attention_mask=mask, cache=first.cache)
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:])
    assert rest.cache.get_seq_length() == tokens.shape[1]
    with pytest.raises(ValueError, match="StaticCache"):
        wrapped(tokens, cache=StaticCache(wrapped.config, max_cache_len=8))


def test_beams_and_padded_prompts_generate_the_same_with_a_cache(exported):
    _, folder = exported
    wrapped, prompts = MoaDistForCausalLM.from_export(folder), tokens_of(2)[:, :6]
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    found = [wrapped.generate(prompts, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("exported", ["moa"], indirect=True)
@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_the_tokenizer_is_saved_next_to_the_model(exported, tmp_path, kind):
    _, folder = exported
    ours = load_tokenizer(folder)
    if kind == "llama":
        ours = load_tokenizer(llama_like(tmp_path), "</s>")
        (folder / TOKENIZER_FILE).write_text(ours.to_json())
    MoaDistForCausalLM.from_export(folder).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    end = ours.end_of_document
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end,) * 3
    for text in ("the cat", f"a {ours.end_token} b\n  ünï 🚢 ", ""):
        assert tokenizer(text).input_ids == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.eos_token_id == end
    batch = tokenizer(["the cat sat", "a"], padding=True)
    assert batch["input_ids"][1][-len(ours.encode("a")) :] == ours.encode("a"), "padded on the left"


def test_documents_are_refused(exported):
    _, folder = exported
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(
        text.replace("document_attention: false", "document_attention: true")
    )
    with pytest.raises(DataError) as caught:
        MoaDistForCausalLM.from_export(folder)
    assert caught.value.key == "data.document_attention"


@pytest.mark.parametrize("exported", ["moa"], indirect=True)
def test_guesses_from_the_prompt_change_nothing(exported):
    _, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(1).repeat(1, 2)
    options = {"max_new_tokens": 8, "do_sample": False}
    assisted = wrapped.generate(tokens, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(assisted, wrapped.generate(tokens, **options))
