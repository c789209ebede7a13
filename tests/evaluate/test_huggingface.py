"""An export behind the interface of transformers says what the model says."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from moa_dist.checkpoint.write import write_sums
from moa_dist.config import to_yaml
from moa_dist.config.data import SourceConfig
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
TASKS = {"tasks": torch.tensor([1, 0])}
"""Of two sequences; ignored by models without a router per task."""
KINDS = [*ATTENTION, "tied", "biased", "capacity", "local", "shared", "recursion", "tasks"]


@pytest.fixture(params=KINDS)
def exported(request, tmp_path):
    """A model without its capacity, and the folder of its export."""
    more = {"num_layers": 4, "num_distinct_layers": 2, "tie_embeddings": request.param == "tied"}
    section, run = request.param, config(tmp_path)
    if section == "recursion":
        section = ATTENTION["dense"]
        more |= {"num_layers": 8, "prelude": 1, "coda": 1, "recursion": {"kind": "token_choice"}}
    if section == "looks ahead":
        section = ATTENTION["dense"]
        more["recursion"] = {"kind": "expert_choice", "capacity": [0.8, 0.4]}
    if section == "tasks":
        section = ATTENTION["moa"]
        section = section | {"router": section["router"] | {"kind": "task", "tasks": 2}}
        train = [SourceConfig(path=f"task{t}", weight=1.0, task=t) for t in range(2)]
        data = run.data.model_copy(update={"train": tuple(train), "valid": None})
        run = run.model_copy(update={"data": data})
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
    run = run.model_copy(
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
    expected = model(tokens, **TASKS).logits
    wrapped = MoaDistForCausalLM.from_export(folder)
    assert torch.equal(wrapped(tokens, **TASKS).logits, expected)
    wrapped.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    assert torch.equal(loaded(tokens, **TASKS).logits, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_generates_what_we_generate(exported, tmp_path, use_cache):
    model, folder = exported
    wrapped, prompts = MoaDistForCausalLM.from_export(folder), tokens_of(2)[:, :4]
    wrapped.save_pretrained(tmp_path / "saved")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache} | TASKS
    found = wrapped.generate(prompts, **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(prompts, **options), found)
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 8, "seed": 0} | WINDOW
    for row, prompt, task in zip(found.tolist(), prompts.tolist(), [1, 0], strict=True):
        drawn = generate(model, [prompt], task=task, **greedy)
        tokens = prompt + [token for _, token in drawn]
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {WINDOW["end_of_document"]}


def test_padding_and_labels(exported):
    model, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    output = wrapped(tokens, attention_mask=mask, labels=labels, **TASKS)
    first = model(tokens[:1], tasks=TASKS["tasks"][:1]).logits[0]
    second = model(tokens[1:, 3:], tasks=TASKS["tasks"][1:]).logits[0]
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
    whole = wrapped(tokens, attention_mask=mask, **TASKS)
    assert whole.cache is None
    first = wrapped(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True, **TASKS)
    rest = wrapped(tokens[:, 5:], attention_mask=mask, cache=first.cache, **TASKS)
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
    options |= TASKS
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


@pytest.mark.parametrize("exported", [k for k in KINDS if k != "recursion"], indirect=True)
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


@pytest.mark.parametrize("exported", ["recursion"], indirect=True)
def test_a_cache_of_tokens_that_recur_cannot_forget_the_last_ones(exported):
    _, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(1).repeat(1, 2)
    with pytest.raises(ValueError, match="crop"):
        wrapped.generate(tokens, max_new_tokens=2, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="crop"):
        wrapped(tokens, use_cache=True).cache.crop(-1)


@pytest.mark.parametrize("exported", ["looks ahead"], indirect=True)
def test_what_looks_ahead_has_logits_and_continues_no_text(exported):
    model, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(2)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    expected = model(tokens, mask.bool()).logits
    assert torch.equal(wrapped(tokens, attention_mask=mask).logits, expected)
    with pytest.raises(ValueError, match="later ones"):
        wrapped(tokens, use_cache=True)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="later ones"):
            wrapped.generate(tokens, max_new_tokens=2, use_cache=use_cache)


@pytest.mark.parametrize("exported", ["tasks"], indirect=True)
def test_a_router_per_task_asks_for_the_task(exported):
    _, folder = exported
    wrapped, tokens = MoaDistForCausalLM.from_export(folder), tokens_of(2)
    logits = [wrapped(tokens, tasks=torch.full((2,), task)).logits for task in (0, 1)]
    assert not torch.equal(*logits)
    for ask in (wrapped, partial(wrapped.generate, max_new_tokens=2)):
        with pytest.raises(DataError) as caught:
            ask(tokens)
        assert caught.value.key == "tasks"
