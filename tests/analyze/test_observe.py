"""Counts agree with what the model did: planted routers, sums, heads by expert."""

from collections import Counter
from math import log

import pytest
import torch

from moa_dist.analyze.analyze import attention_results, observe, router_results
from moa_dist.analyze.headline import headline
from moa_dist.analyze.selections import Selections
from moa_dist.models.calls import RouterCall
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.objective import Batch
from moa_dist.moe.router import Routing
from moa_dist.moe.statistics import RoutingStatistics
from tests.models.small import (
    ATTENTION,
    FFN,
    LENGTH,
    small_config,
    small_model,
    tokens_of,
    with_capacity,
)

CPU = torch.device("cpu")


def planted_model(num_experts: int = 4) -> LanguageModel:
    """Token t always chooses expert t mod 4, in both repeats of its only layer."""
    ffn = FFN["moe"] | {"router": {"num_experts": num_experts, "top_k": 1, "score": "sigmoid"}}
    config = small_config("dense", ffn, vocab_size=7, num_layers=2, num_distinct_layers=1)
    model = build_model(config).eval()
    block = model.stack.layers[0]
    for weight in (block.attention.o.weight, block.ffn.down.weight, model.embedding.weight):
        torch.nn.init.zeros_(weight)  # the residual stream stays what the embedding says
    for token in range(7):
        torch.nn.init.ones_(model.embedding.weight[token, token % num_experts, None])
    torch.nn.init.eye_(block.ffn.router.logits.weight)
    return model


def rows_real(real: list[bool]) -> torch.Tensor:
    """[B, S + 1], all of a row or nothing."""
    return torch.tensor(real)[:, None].expand(-1, LENGTH)


TEXT = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 0], [0, 0, 1, 1, 1, 2, 5, 5, 3]])
"""The last of each row is not read."""


def test_planted_experts_are_found():
    model = planted_model()
    seen = observe(model, [Batch(TEXT)], CPU)
    (router,) = router_results(model, seen, 1, str)
    # Read: 0 four times, 1 four, 2 twice, 3 once, 4 once, 5 three times, 6 once; so of 16 tokens
    # expert 0 takes 5, expert 1 takes 7, expert 2 takes 3, expert 3 takes 1.
    assert router.load == [[5, 7, 3, 1]] * 2
    found = [[(t.text, t.count, t.share) for t in tokens] for tokens in router.top_tokens]
    assert found == [
        [("0", 8, 1.0), ("4", 2, 1.0)],
        [("1", 8, 1.0), ("5", 6, 1.0)],
        [("2", 4, 1.0), ("6", 2, 1.0)],
        [("3", 2, 1.0)],
    ]
    for tokens, load in zip(router.top_tokens, router.load[0], strict=True):
        # p(t, e) = p(t), so PMI is -log p(e).
        assert [t.pmi for t in tokens] == pytest.approx([log(16 / load)] * len(tokens))
    assert router.information == pytest.approx(router.most_information)
    assert headline(router).explained == pytest.approx(1)


def test_rare_tokens_are_not_named():
    model = planted_model()
    seen = observe(model, [Batch(TEXT)], CPU)
    (router,) = router_results(model, seen, 3, str)
    assert [[t.text for t in tokens] for tokens in router.top_tokens] == [["0"], ["1", "5"], [], []]
    assert router.top_tokens[0][0].pmi == pytest.approx(log(16 / 5)), "rare ones count in p(e)"


@pytest.mark.parametrize("attention", ["moa", "switchhead"])
def test_sums_agree_with_the_statistics_and_with_each_other(attention):
    model = small_model(attention=attention, num_layers=6, num_distinct_layers=2).eval()
    batches = [
        Batch(tokens_of(3, seed=1), rows_real([True, True, False])),
        Batch(tokens_of(3, seed=2)),
    ]
    loads = Counter()
    for batch in batches:
        for call, statistics in model(*batch.inputs()).statistics.items():
            loads[call] = loads[call] + statistics.load.sum(0).flatten()
    seen = observe(model, batches, CPU)
    num_tokens = 5 * (tokens_of().shape[1] - 1)
    assert seen.occurrences_V["text"].sum() == num_tokens
    assert {(s.layer, s.router) for s in loads} == seen.routers.keys()
    for (layer, router), chosen in seen.routers.items():
        for repeat in range(3):
            assert torch.equal(chosen.load_RE[repeat], loads[layer, repeat, router])
        assert torch.equal(chosen.tokens_VE.sum(0), chosen.load_RE.sum(0))
        assert torch.equal(
            chosen.tokens_VE.sum(1), seen.occurrences_V["text"] * 3 * chosen.choices
        ), "every token chooses as many"
        assert torch.equal(chosen.together_EE.diagonal(), chosen.load_RE.sum(0))
        assert torch.equal(chosen.together_EE.sum(1), chosen.load_RE.sum(0) * chosen.choices)
        assert torch.equal(chosen.together_EE, chosen.together_EE.T)
        assert set(chosen.common_RR.diagonal().tolist()) == {num_tokens * chosen.choices}
        assert chosen.distinct.sum() == num_tokens
        assert not chosen.distinct[: chosen.choices].any()


def test_dropped_choices_are_counted():
    model = small_model(**with_capacity("position")).eval()
    batch = Batch(tokens_of())
    expected = model(*batch.inputs()).statistics
    for router in router_results(model, observe(model, [batch], CPU), 1, str):
        dropped = expected[router.layer, 0, router.router].dropped.sum(0).flatten()
        assert router.dropped == [dropped.tolist()]
    assert sum(s.dropped.sum() for s in expected.values()), "nothing was dropped"


@pytest.mark.parametrize("attention", ["moa", "switchhead"])
def test_a_translating_model_has_two_texts(attention):
    """The encoder's routers read the source, and so does that of cross-attention's values."""
    fields = {"position": "sinusoidal", "objective": "translation", "num_distinct_layers": 1}
    model = small_model(attention=attention, **fields).eval()
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, 4])[:, None]
    source_mask = torch.arange(12) < torch.tensor([5, 12])[:, None]  # longer than the target
    batch = Batch(tokens_of(), real, None, tokens_of(2, 12, seed=1), source_mask)
    seen = observe(model, [batch], CPU)
    lengths = {"text": LENGTH - 1 + 4, "source": 5 + 12}
    assert {text: int(seen.occurrences_V[text].sum()) for text in lengths} == lengths
    statistics = model(*batch.inputs()).statistics
    assert {call.key for call in statistics} == seen.routers.keys()
    for (layer, name), chosen in seen.routers.items():
        text = "source" if layer == 0 or name == "attention.cross.value" else "text"
        assert seen.text_of_router((layer, name)) == text
        assert torch.equal(
            chosen.tokens_VE.sum(1), seen.occurrences_V[text] * 2 * chosen.choices
        ), "every token chooses as many"
        for repeat in range(2):
            load = statistics[RouterCall(layer, repeat, name)].load.sum(0).flatten()
            assert torch.equal(chosen.load_RE[repeat], load)
    layers = attention_results(seen)
    titles = ["L0 R0", "L0 R1", "L1 R0", "L1 R0 cross", "L1 R1", "L1 R1 cross"]
    assert [layer.title for layer in layers] == titles
    per_token = 4 if attention == "moa" else 2  # two experts of two heads
    for layer in layers:
        beyond_first = lengths["source" if layer.layer == 0 else "text"] - 2
        assert sum(head.queries for head in layer.heads) == per_token * beyond_first
    crossed = {layer.repeat: layer.heads for layer in layers if layer.attention != "attention"}
    traces = model(*batch.inputs(), trace=True).traces
    for repeat, heads in crossed.items():
        looked = traces[1, repeat].heads["attention.cross"].summary.entropy
        counted = batch.inputs()[1][:, None, 1:]
        total = sum(head.entropy * head.queries for head in heads)
        assert total == pytest.approx((looked[..., 1:] * counted).sum().item())


def routing(ids: list[list[int]], num_experts: int) -> Routing:
    none = torch.zeros(1, 1, num_experts, dtype=torch.int64)
    statistics = RoutingStatistics(none, none, none, none, none, none)
    return Routing(torch.tensor(ids)[:, None], torch.empty(0), None, statistics)


def test_repeats_are_compared_token_by_token():
    """Two repeats with equal loads have all experts in common, or none."""
    first, same, other = [[0, 1], [2, 3]], [[1, 0], [3, 2]], [[2, 3], [0, 1]]
    for second, common, distinct in ((same, 4, [0, 0, 2, 0, 0]), (other, 0, [0, 0, 0, 0, 2])):
        chosen = Selections(5, 4, 2, 2, CPU)
        routings = [routing(first, 4), routing(second, 4)]
        chosen.add(torch.tensor([3, 4]), torch.tensor([True, True]), routings)
        assert chosen.load_RE.tolist() == [[1, 1, 1, 1]] * 2
        assert chosen.common_RR.tolist() == [[4, common], [common, 4]]
        assert chosen.distinct.tolist() == distinct


@pytest.mark.parametrize("capacity", [{}, with_capacity("position")], ids=["all", "drops"])
def test_heads_of_moa_belong_to_the_experts_that_tokens_choose(capacity):
    model = small_model(**({"attention": "moa"} | capacity), num_layers=1).eval()
    tokens, counts = tokens_of(3), torch.tensor([True, False, True])
    (layer,) = attention_results(observe(model, [Batch(tokens, rows_real(counts.tolist()))], CPU))
    trace = model(tokens[counts, :-1], trace=True).traces[0, 0]
    query = trace.routing["attention.query"]
    ids = query.topk_ids.view(2, -1, 2)
    kept = (
        torch.ones_like(ids, dtype=torch.bool)
        if query.keep_mask is None
        else query.keep_mask.view_as(ids)
    )
    assert kept.all() == (not capacity)
    sums, queries = torch.zeros(6, dtype=torch.float64), [0] * 6
    for b in range(2):
        for t in range(1, ids.shape[1]):  # the first token sees only itself
            for slot in kept[b, t].nonzero().flatten().tolist():
                for inner in range(2):
                    head = int(ids[b, t, slot]) * 2 + inner
                    sums[head] += (
                        trace.heads["attention"].summary.entropy[b, slot * 2 + inner, t].item()
                    )
                    queries[head] += 1
    assert [head.queries for head in layer.heads] == queries
    for head, total in zip(layer.heads, sums.tolist(), strict=True):
        assert head.entropy == pytest.approx(total / max(head.queries, 1))


def test_a_dense_model_has_heads_only():
    model = small_model(attention="dense", ffn="dense").eval()
    seen = observe(model, [Batch(tokens_of())], CPU)
    assert router_results(model, seen, 1, str) == []
    first, second = attention_results(seen)
    assert (first.layer, first.repeat, second.layer) == (0, 0, 1)
    assert [head.queries for head in first.heads] == [2 * (tokens_of().shape[1] - 2)] * 2


@pytest.mark.parametrize("attention", ATTENTION)
def test_documents_in_one_sequence_are_seen_as_those_alone(attention):
    model, tokens = small_model(attention=attention).eval(), tokens_of(2, 9)
    tokens[:, 3], tokens[:, 8:] = 0, 1
    tokens[:, 4:8] += tokens[:, 4:8] == 0
    tokens[:, :3] += tokens[:, :3] == 0
    alone = torch.cat([tokens[:, :4], tokens[:, 4:8]])
    together = attention_results(observe(model, [Batch(tokens).in_documents(0)], CPU))
    apart = attention_results(observe(model, [Batch(alone, targets=alone)], CPU))
    for layer, expected in zip(together, apart, strict=True):
        for head, other in zip(layer.heads, expected.heads, strict=True):
            assert head.model_dump() == pytest.approx(other.model_dump())
