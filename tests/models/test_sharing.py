"""Sharing by part: what is shared is one tensor, what is not is one per application."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moa_dist.analyze.analyze import attention_results, observe, router_results
from moa_dist.analyze.panels import plates
from moa_dist.analyze.results import Analysis
from moa_dist.config.model import ModelConfig
from moa_dist.config.sharing import SharingConfig
from moa_dist.models.calls import RouterCall
from moa_dist.models.counts import count
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.objective import Batch
from moa_dist.models.stack_counts import applications
from moa_dist.moe.losses import BALANCE_LOSSES
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import total
from tests.models.small import ATTENTION, FFN, VOCABULARY, small_config, tokens_of

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SHARED: dict[str, dict[str, Any]] = {
    "ends": {"prelude": 1, "coda": 2, "prelude_ffn": {"d_ff": 12}},
    "sequence": {"sharing": {"order": "sequence"}},
    "norms": {"sharing": {"own": ["norms"]}},
    "routers": {"sharing": {"own": ["routers"], "order": "sequence"}},
    "tied experts": {
        "prelude": 1,
        "prelude_ffn": {"d_ff": 12},
        "sharing": {"own": ["attention", "norms", "routers"]},
    },
    "own ffn": {"sharing": {"own": ["ffn"]}},
    "adapters": {"coda": 1, "sharing": {"adapter_rank": 2, "vectors": True}},
    "everything": {
        "prelude": 1,
        "coda": 1,
        "sharing": {"own": ["norms", "routers"], "adapter_rank": 2, "vectors": True},
    },
}
"""Fields of models with four applications of two layers between prelude and coda."""


def config_of(name: str, attention: str = "switchhead", ffn: str = "moe", **more) -> ModelConfig:
    fields = SHARED[name]
    num_layers = 4 + fields.get("prelude", 0) + fields.get("coda", 0)
    return small_config(
        attention=attention, ffn=ffn, **fields, **more, num_layers=num_layers, num_distinct_layers=2
    )


def model_of(name: str, *, recompute: bool = False, **more: Any) -> LanguageModel:
    """In fp64, and no parameter is zero or one."""
    model = build_model(config_of(name, **more), recompute=recompute).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def unshared(config: ModelConfig) -> ModelConfig:
    """A model of the same function whose layers are all distinct, adapters excluded."""
    return config.model_copy(update={"num_distinct_layers": None, "sharing": SharingConfig()})


def layer_of(config: ModelConfig, position: int) -> int:
    """The block whose shared parts an application uses, as the documentation says."""
    i, between = position - config.prelude, config.num_core_layers
    if not 0 <= i < between:
        return position
    first = i % 2 if config.sharing.order == "cycle" else i // 2 * (between // 2)
    return config.prelude + first


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["norms", "routers", "tied experts", "own ffn"])
def test_copies_compute_the_same(name, attention):
    """And the gradient of what is shared is the sum over copies."""
    shared = model_of(name, attention=attention, norm_placement="peri")
    copied = build_model(unshared(shared.config)).double()
    held = dict(shared.named_parameters())
    source = {}
    for target in dict(copied.named_parameters()):
        position = int(target.split(".")[2]) if target.startswith("stack.layers.") else None
        source[target] = target
        if target not in held:
            assert position is not None
            lender = layer_of(shared.config, position)
            source[target] = target.replace(f"layers.{position}.", f"layers.{lender}.")
    copied.load_state_dict({target: held[name] for target, name in source.items()})
    tokens = tokens_of()
    ours, theirs = shared(tokens), copied(tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    for output in (ours, theirs):
        F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()).backward()
    sums = {name: torch.zeros_like(parameter) for name, parameter in held.items()}
    for target, parameter in copied.named_parameters():
        if parameter.grad is not None:
            sums[source[target]] += parameter.grad
    for name, parameter in held.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, sums[name], **CLOSE, msg=name)


@pytest.mark.parametrize("name", SHARED)
def test_every_parameter_has_one_name(name):
    model = model_of(name)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert count(model.config, 8).total == sum(p.numel() for p in model.parameters())


def test_names_say_what_is_held_where():
    held = {n.partition(".weight")[0] for n, _ in model_of("tied experts").named_parameters()}
    assert "stack.layers.0.ffn.up" in held  # the prelude's
    for block in range(1, 5):
        layer = f"stack.layers.{block}"
        own = {f"{layer}.attention.q", f"{layer}.ffn_norm", f"{layer}.ffn.router.logits"}
        assert own <= held
        assert (f"{layer}.ffn.up" in held) == (block < 3)


def test_default_names_have_not_changed():
    names = build_model(small_config(num_layers=4, num_distinct_layers=2)).state_dict()
    assert {name.split(".")[2] for name in names if name.startswith("stack.")} == {"0", "1"}


@pytest.mark.parametrize("name", SHARED)
def test_recomputation_is_bit_identical(name):
    tokens, results = tokens_of(), []
    for recompute in (False, True):
        model = model_of(name, recompute=recompute).train()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("name", SHARED)
def test_a_cache_changes_nothing(name):
    model, tokens = model_of(name).eval(), tokens_of(length=9)
    whole = model(tokens).logits
    first = model(tokens[:, :5], None, model.empty_cache())
    second = model(tokens[:, 5:], None, first.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **CLOSE)


@pytest.mark.parametrize("name", SHARED)
def test_applications_differ_only_where_told(name):
    """A copy computes the same; a change of what one application has of its own shows."""
    model = model_of(name).eval()
    again, tokens = copy.deepcopy(model), tokens_of()
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    for parameter in again.parameters():
        before = model(tokens).logits
        parameter.data += 0.5
        after = again(tokens).logits
        assert not torch.equal(before, after) or parameter.numel() == 0
        parameter.data -= 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ends", [(1, 0), (2, 0), (1, 1), (2, 1), (3, 0), (4, 0)]),
        ("sequence", [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ("norms", [(0, 0), (1, 0), (0, 1), (1, 1)]),
        ("routers", [(0, 0), (1, 0), (2, 0), (3, 0)]),
    ],
)
def test_routers_are_counted_by_themselves(name, expected):
    model = model_of(name)
    calls = [RouterCall(*call, "ffn") for call in expected]
    assert [call for call in model(tokens_of()).statistics if call.router == "ffn"] == calls
    assert {call.key for call in calls} <= model.routers().keys()
    assert len(model.routers()) == sum(isinstance(m, Router) for m in model.modules())


def test_losses_are_taken_over_the_repeats_of_each_router():
    """Layers that are applied once have losses beside those that repeat."""
    ffn = FFN["moe"] | {"router": FFN["moe"]["router"] | {"balance": {"entropy": 1.0}}}
    fields = {"num_layers": 5, "num_distinct_layers": 2, "prelude": 1}
    model = build_model(small_config(ffn=ffn, **fields)).double()
    copies = build_model(small_config(ffn=ffn, num_layers=5)).double()
    weights = model.state_dict()
    names = {n: n.replace("layers.3.", "layers.1.").replace("layers.4.", "layers.2.") for n in
             copies.state_dict()}  # fmt: skip
    copies.load_state_dict({n: weights[source] for n, source in names.items()})
    statistics = copies(tokens_of()).statistics
    expected = sum(
        BALANCE_LOSSES["entropy"](total(statistics[RouterCall(i, 0, "ffn")] for i in layers))
        for layers in ((0,), (1, 3), (2, 4))
    )
    torch.testing.assert_close(model(tokens_of()).aux_losses["ffn/entropy"], expected, **CLOSE)


def test_work_and_applications():
    model = model_of("tied experts")
    single = build_model(unshared(model.config))
    assert model.macs(8, training=True) == single.macs(8, training=True)
    times, blocks = applications(model), list(model.stack.blocks())
    assert times[blocks[0].ffn] == times[blocks[4].attention] == times[blocks[4].ffn] == 1
    assert times[blocks[1].ffn.up] == 2
    adapters = model_of("adapters", attention="dense", ffn="dense")
    adapted = adapters.macs(8, training=True)["projections"]
    dense = build_model(config_of("sequence", attention="dense", ffn="dense"))
    plain = dense.macs(8, training=True)
    added = 4 * 8 * 2 * (4 * (8 + 8) + 2 * (8 + 12))  # 4 applications, 8 tokens, rank 2
    assert adapted == plain["projections"] * 5 // 4 + added


def test_adapters_add_nothing_at_first():
    model = build_model(config_of("adapters", attention="dense", ffn="dense")).double()
    plain = build_model(
        small_config("dense", "dense", num_layers=5, num_distinct_layers=2, coda=1)
    ).double()
    own = model.state_dict()
    renamed = {n: own.get(n, None) for n in plain.state_dict()}
    for name, value in renamed.items():
        if value is None:
            source = name.replace(".weight", ".shared.weight").replace("layers.2.", "layers.4.")
            renamed[name] = own[source if source in own else source.replace(".shared", "")]
    coda = {n.replace("layers.4.", "layers.2."): v for n, v in own.items() if "layers.4." in n}
    plain.load_state_dict(renamed | coda)
    torch.testing.assert_close(model(tokens_of()).logits, plain(tokens_of()).logits, **CLOSE)


def test_both_texts_of_a_translation():
    model = model_of("everything", attention="moa", objective="translation").eval()
    again = copy.deepcopy(model)
    source, target = tokens_of(), tokens_of(seed=1)
    logits = model(target, source=source).logits
    assert torch.equal(logits, again(target, source=source).logits)
    blocks = list(model.stack.blocks())
    assert blocks[1].cross.attention.q is blocks[3].cross.attention.q
    assert blocks[1].cross.norm is not blocks[3].cross.norm
    assert logits.shape == (2, 8, VOCABULARY)
    assert {call.layer for call in model(target, source=source).statistics} == set(range(12))


def test_choices_of_shared_routers_are_analyzed_together():
    """Routers of one application have one repeat; plots and results hold both."""
    model = model_of("tied experts").eval()
    seen = observe(model, [Batch(tokens_of(4))], torch.device("cpu"))
    repeats = {(r.layer, r.router): r.num_repeats for r in router_results(model, seen, 1, str)}
    assert repeats == {
        (layer, router): 1
        for layer in range(5)
        for router in ("attention.value", "attention.output", "ffn")
        if layer or router != "ffn"
    }
    for name, expected in (("everything", {1}), ("adapters", {1, 2})):
        model = model_of(name).eval()
        seen = observe(model, [Batch(tokens_of(4))], torch.device("cpu"))
        routers, heads = router_results(model, seen, 1, str), attention_results(seen)
        assert {r.num_repeats for r in routers} == expected
        assert len(heads) == model.config.num_layers
        analysis = Analysis(
            name="", step=1, data="", tokens=32, sequence_length=8, min_count=1,
            routers=routers, attention=heads,
        )  # fmt: skip
        assert plates(analysis)


@pytest.mark.parametrize("name", ["adapters", "everything"])
def test_blocks_that_borrow_compile(name):
    model, plain = (model_of(name, attention="moa", ffn="dense").float() for _ in range(2))
    model.compile_blocks(backend="eager")
    for each in (model, plain):
        each.train()(tokens_of()).logits.square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
