"""Combinations that cannot work are refused, with values that do."""

from __future__ import annotations

import pytest

from moa_dist.config import checks, load_config
from moa_dist.errors import Problem

DENSE = ["model.attention.kind=dense", "model.attention.num_heads=2", "model.attention.d_head=16"]
TRANSLATION = ["model.objective=translation"]
DENSE_FFN = ["model.ffn.kind=dense", "model.ffn.d_ff=64"]

LAYERS = ("model.num_distinct_layers", "model.num_layers")
BATCHES = ("train.global_batch", "train.micro_batch")
ATTENTION, FFN = "model.attention.router", "model.ffn.router"
PRECISION = ("train.precision", "parallel.zero_stage")
KEPT = ("checkpoint.keep_every", "checkpoint.every")
EP = "parallel.expert_parallel"
OFFLOAD = "optimizer.offload"
COMPILE = "train.compile"
ROPE, WINDOW = "model.attention.rope", "model.attention.window"
SCALING, LIMIT = f"{ROPE}.scaling", f"{FFN}.group_limit"
FULL = (f"{WINDOW}.full_every", "model.num_layers")
RECURSION = "model.recursion"
TOKEN_CHOICE = f"{RECURSION}={{kind: token_choice}}"
EXPERT_CHOICE = f"{RECURSION}={{kind: expert_choice, capacity: [1, 0.5]}}"
SHARES = f"{RECURSION}.capacity"


@pytest.mark.parametrize(
    ("overrides", "keys", "suggestions"),
    [
        (["name=a/b"], ("name",), {}),
        (["model.num_distinct_layers=3"], LAYERS, {LAYERS[0]: [1, 2, 4]}),
        (["model.prelude=1"], LAYERS, {LAYERS[0]: [1, 3]}),
        (["model.prelude=2", "model.coda=2"], ("model.prelude", "model.coda", LAYERS[1]), {}),
        (["model.prelude_ffn={d_ff: 8}"], ("model.prelude_ffn", "model.prelude"), {}),
        (
            ["model.num_distinct_layers=null", "model.sharing.adapter_rank=2"],
            ("model.sharing", LAYERS[0]),
            {},
        ),
        (["model.sharing.own=[routers, attention, ffn]"], ("model.sharing.own",), {}),
        ([TOKEN_CHOICE, "model.num_distinct_layers=4"], (RECURSION, LAYERS[0]), {}),
        ([TOKEN_CHOICE, "model.num_distinct_layers=20"], LAYERS, {LAYERS[0]: [1, 2, 4]}),
        ([EXPERT_CHOICE, f"{SHARES}=[1.0]"], (SHARES, LAYERS[1], LAYERS[0]), {}),
        (
            [
                f"{RECURSION}={{kind: expert_choice, capacity: [1, 0.5], sampling: 0, "
                "separate_sampler: true}"
            ],
            (f"{RECURSION}.separate_sampler", f"{RECURSION}.sampling"),
            {},
        ),
        ([EXPERT_CHOICE, f"{SHARES}=[0.5, 0.7]"], (SHARES,), {}),
        (
            [TOKEN_CHOICE, "model.sharing.order=sequence"],
            (RECURSION, "model.sharing.order"),
            {},
        ),
        (
            [TOKEN_CHOICE, "model.halting={kind: stick_breaking}"],
            (RECURSION, "model.halting"),
            {},
        ),
        ([TOKEN_CHOICE, *TRANSLATION], (RECURSION, "model.objective"), {}),
        ([TOKEN_CHOICE, f"{WINDOW}={{size: 4}}"], (RECURSION, WINDOW), {}),
        (
            [TOKEN_CHOICE, "data.document_attention=true"],
            (RECURSION, "data.document_attention"),
            {},
        ),
        (
            [TOKEN_CHOICE, "train.compile=true", f"{EP}=1"],
            (RECURSION, COMPILE, f"{RECURSION}.kind"),
            {},
        ),
        (
            [EXPERT_CHOICE, "evaluation.samples.prompts=[one]"],
            ("evaluation.samples.prompts", f"{RECURSION}.kind"),
            {},
        ),
        (
            [EXPERT_CHOICE, "data.valid=data/valid", "evaluation.tasks=[piqa=a]"],
            ("evaluation.tasks", f"{RECURSION}.kind"),
            {},
        ),
        (["model.sharing.own=[norms, norms]"], ("model.sharing.own",), {}),
        (
            ["model.attention.rope.fraction=0.1"],
            ("model.attention.rope.fraction", "model.attention.d_head"),
            {},
        ),
        (
            ["model.attention.router.top_k=5"],
            (f"{ATTENTION}.top_k", f"{ATTENTION}.num_experts"),
            {f"{ATTENTION}.top_k": [4]},
        ),
        (
            ["model.ffn.router.top_k=9"],
            (f"{FFN}.top_k", f"{FFN}.num_experts"),
            {f"{FFN}.top_k": [8]},
        ),
        (
            ["model.ffn.router.top_k=8", "model.ffn.router.expert_dropout=0.1"],
            (f"{FFN}.expert_dropout", f"{FFN}.top_k", f"{FFN}.num_experts"),
            {},
        ),
        (
            ["model.ffn.router.top_k=1", "model.ffn.router.gate=renormalized"],
            (f"{FFN}.gate", f"{FFN}.top_k"),
            {f"{FFN}.gate": ["raw", "renormalized_detached"]},
        ),
        (
            ["model.attention.router.group_sequences=3"],
            (f"{ATTENTION}.group_sequences", "train.micro_batch"),
            {f"{ATTENTION}.group_sequences": [1, 2, 4]},
        ),
        (["model.attention.window={size: 4, full_every: 9}"], FULL, {FULL[0]: [None]}),
        (["model.attention.window={size: 4, rope: {}}"], (f"{WINDOW}.rope", FULL[0]), {}),
        (
            ["model.attention.window={size: 4, full_every: 2, rope: {fraction: 0.1}}"],
            (f"{WINDOW}.rope.fraction", "model.attention.d_head"),
            {},
        ),
        (
            [f"{SCALING}={{kind: yarn, factor: 4}}"],
            (f"{SCALING}.original_length", f"{SCALING}.kind"),
            {},
        ),
        (
            [f"{SCALING}={{kind: linear, factor: 4, attention_factor: 2}}"],
            (f"{SCALING}.attention_factor", f"{SCALING}.kind"),
            {},
        ),
        (
            [f"{SCALING}={{kind: yarn, factor: 4, original_length: 64, slow_turns: 40}}"],
            (f"{SCALING}.slow_turns", f"{SCALING}.fast_turns"),
            {},
        ),
        (
            [f"{SCALING}={{kind: yarn, factor: 4, original_length: 64}}", f"{ROPE}.base=1"],
            (f"{ROPE}.base", f"{SCALING}.kind"),
            {},
        ),
        (
            [f"{LIMIT}={{num_groups: 3, top_groups: 1}}"],
            (f"{LIMIT}.num_groups", f"{FFN}.num_experts"),
            {},
        ),
        (
            [f"{LIMIT}={{num_groups: 4, top_groups: 4}}"],
            (f"{LIMIT}.top_groups", f"{LIMIT}.num_groups"),
            {},
        ),
        (
            [f"{LIMIT}={{num_groups: 4, top_groups: 1}}", f"{FFN}.top_k=3"],
            (f"{FFN}.top_k", f"{LIMIT}.top_groups"),
            {},
        ),
        (["train.global_batch=9"], BATCHES, {BATCHES[0]: [8, 12], BATCHES[1]: [3, 9]}),
        (["train.global_batch=2"], BATCHES, {BATCHES[0]: [4], BATCHES[1]: [2]}),
        (["schedule.warmup_steps=101"], ("schedule.warmup_steps", "train.steps"), {}),
        (["schedule.kind=inverse_sqrt"], ("schedule.kind", "schedule.warmup_steps"), {}),
        (["schedule.final=1.5"], ("schedule.final",), {}),
        (["init.weights=a", "init.branch=b"], ("init.weights", "init.branch"), {}),
        (["init.new=[a]"], ("init.new", "init.weights"), {}),
        (["evaluation.tasks=[piqa=a]"], ("evaluation.tasks", "data.valid"), {}),
        (
            ["evaluation.samples.prompts=[a]", "model.objective=masked"],
            ("evaluation.samples.prompts", "model.objective"),
            {},
        ),
        (
            ["schedule.phases=[{to: 1}]"],
            ("schedule.phases", "schedule.kind"),
            {"schedule.kind": ["phases"]},
        ),
        (["schedule.kind=phases"], ("schedule.phases", "schedule.kind"), {}),
        (
            ["schedule.kind=phases", "schedule.phases=[{to: 1}, {to: 0}]"],
            ("schedule.phases",),
            {},
        ),
        (
            ["schedule.kind=phases", "schedule.phases=[{steps: 60, to: 1}, {steps: 41, to: 0}]"],
            ("schedule.phases", "train.steps"),
            {},
        ),
        (
            ["schedule.kind=phases", "schedule.phases=[{to: 1}]", "schedule.warmup_steps=5"],
            ("schedule.warmup_steps", "schedule.kind"),
            {},
        ),
        (["schedule.kind=wsd"], ("schedule.decay_steps", "schedule.kind"), {}),
        (
            ["schedule.decay_steps=5"],
            ("schedule.decay_steps", "schedule.kind"),
            {"schedule.kind": ["wsd"]},
        ),
        (
            ["schedule.kind=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=50"],
            ("schedule.warmup_steps", "schedule.decay_steps", "train.steps"),
            {},
        ),
        (["train.label_smoothing=1"], ("train.label_smoothing",), {}),
        (
            [*TRANSLATION, "data.bucket_tokens=1"],
            ("data.bucket_tokens", "data.sequence_length"),
            {},
        ),
        (
            [*TRANSLATION, "data.on_damage=skip", "data.verify=checksums"],
            ("data.on_damage", "model.objective"),
            {"data.on_damage": ["stop"]},
        ),
        (
            [*TRANSLATION, "model.ffn.router.group_sequences=2"],
            (f"{FFN}.group_sequences", "model.objective"),
            {f"{FFN}.group_sequences": [1]},
        ),
        (
            [*TRANSLATION, "model.attention.router.balance.scope=global_batch"],
            (f"{ATTENTION}.balance.scope", "model.objective"),
            {},
        ),
        (["schedule.warmup_start=2"], ("schedule.warmup_start",), {}),
        (["optimizer.betas=[0.9, 1.0]"], ("optimizer.betas",), {}),
        (
            ["optimizer.momentum=0.9"],
            ("optimizer.momentum", "optimizer.kind"),
            {"optimizer.kind": ["sgd"]},
        ),
        (["train.precision=bf16", "parallel.zero_stage=0"], PRECISION, {PRECISION[1]: [1]}),
        (
            [f"{OFFLOAD}=host", "parallel.zero_stage=0"],
            (OFFLOAD, "parallel.zero_stage"),
            {OFFLOAD: ["none"], "parallel.zero_stage": [1]},
        ),
        (
            [f"{OFFLOAD}=host", "optimizer.kind=muon"],
            (OFFLOAD, "optimizer.kind"),
            {OFFLOAD: ["none"], "optimizer.kind": ["adamw"]},
        ),
        (
            ["train.compile=true", "train.recompute=true", f"{EP}=1"],
            (COMPILE, "train.recompute"),
            {COMPILE: [False], "train.recompute": [False]},
        ),
        (
            ["train.compile=true", "data.document_attention=true", f"{EP}=1"],
            (COMPILE, "data.document_attention"),
            {COMPILE: [False], "data.document_attention": [False]},
        ),
        (
            [*TRANSLATION, "data.document_attention=true"],
            ("data.document_attention", "model.objective"),
            {"data.document_attention": [False]},
        ),
        (
            ["train.compile=true", "parallel.zero_stage=3", f"{EP}=1"],
            (COMPILE, "parallel.zero_stage"),
            {COMPILE: [False], "parallel.zero_stage": [2]},
        ),
        (
            [
                "train.compile=true",
                f"{EP}=2",
                "parallel.expert_exchange.attention=weights",
                "parallel.expert_exchange.ffn=tokens",
            ],
            (COMPILE, "parallel.expert_exchange.ffn"),
            {COMPILE: [False], "parallel.expert_exchange.ffn": ["weights"], EP: [1]},
        ),
        (
            ["checkpoint.every=300", "checkpoint.keep_every=1000"],
            KEPT,
            {KEPT[0]: [900, 1200]},
        ),
        (["profile.steps=[5, 15]"], ("profile.steps", "train.steps"), {}),
        (["profile.steps=[7, 6]"], ("profile.steps", "train.steps"), {}),
        (["profile.steps=[98, 101]"], ("profile.steps", "train.steps"), {}),
        ([*DENSE, *DENSE_FFN], (EP,), {EP: [1]}),
        (["parallel.expert_parallel=9"], (EP, f"{ATTENTION}.num_experts"), {EP: [8]}),
    ],
)
def test_impossible_combination(base, problems, overrides, keys, suggestions):
    first, *others = problems(base, *overrides)
    assert first.keys == keys
    assert plain(first.suggestions) == suggestions
    # Attention and FFN have 8 experts each.
    expected = [(EP, f"{FFN}.num_experts")] if "parallel.expert_parallel=9" in overrides else []
    assert [other.keys for other in others] == expected


def plain(suggestions):
    return {key: list(values) for key, values in suggestions.items()}


def test_a_check_with_a_bug_is_not_taken_for_one_that_reads_an_invalid_field(
    base, problems, monkeypatch
):
    """Whether or not a field is invalid: each of these checks is wrong in itself."""
    for check in (
        lambda config: [config.train.no_such_field],
        lambda config: [config.model.routers().no_such_method()],
        lambda config: [config.optimizer.kind.no_such_attribute],
    ):
        monkeypatch.setattr(checks, "CHECKS", (check,))
        for overrides in ([], ["train.steps=soon"]):
            with pytest.raises(AttributeError, match="no_such"):
                load_config(base, overrides)


def test_a_check_that_reads_an_invalid_field_is_skipped(base, problems, monkeypatch):
    def reads_all(config):
        yield Problem("always", (str(config.train.steps), config.name))

    monkeypatch.setattr(checks, "CHECKS", (reads_all,))
    assert [found.keys for found in problems(base, "train.steps=soon")] == [("train.steps",)]
    invalid, ours = problems(base, "train.seed=soon")
    assert (invalid.keys, ours.keys) == (("train.seed",), ("100", "base"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.expert_parallel=8"],  # SwitchHead's 2 heads x 4 experts, and 8 in the FFN
        DENSE_FFN,
        DENSE,
        [*DENSE, *DENSE_FFN, "parallel.expert_parallel=1"],
        ["model.norm_placement=post", "model.tie_embeddings=true"],
        ["parallel.zero_stage=0"],
        ["train.precision=bf16"],
        ["optimizer.kind=sgd", "optimizer.momentum=0.9"],
        ["schedule.warmup_steps=100"],
        ["evaluation.sequences=3"],
        ["checkpoint.every=300", "checkpoint.keep_every=900"],
        ["model.ffn.router.top_k=1", "model.ffn.router.gate=renormalized_detached"],
    ],
)
def test_possible_combination(base, overrides):
    load_config(base, overrides)  # raises on any problem
