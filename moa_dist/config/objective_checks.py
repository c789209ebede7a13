"""Checks of what a model's objective rules out."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.routers import RouterConfig
from moa_dist.config.run import Config
from moa_dist.errors import Problem


def causal_attention(config: Config) -> Iterator[Problem]:
    """Some attention has no meaning for keys behind the query."""
    if config.model.objective != "causal" and config.model.attention.is_causal:
        yield Problem(
            f"`model.attention` sees earlier tokens only, but with `model.objective` "
            f"{config.model.objective} tokens see both sides; use another attention",
            ("model.attention", "model.objective"),
        )


def translation(config: Config) -> Iterator[Problem]:
    """Translation reads its data as pairs, in buckets."""
    if config.model.objective != "translation":
        return
    data = config.data
    if data.bucket_tokens < data.sequence_length:
        yield Problem(
            f"`data.bucket_tokens` is {data.bucket_tokens}, but a bucket must fit one pair; use at "
            f"least `data.sequence_length` = {data.sequence_length}",
            ("data.bucket_tokens", "data.sequence_length"),
        )
    if data.document_attention:
        yield Problem(
            "`data.document_attention` does not work with `model.objective` translation, where "
            "every pair is a sequence of its own and sees no other; set it to false",
            ("data.document_attention", "model.objective"),
            {"data.document_attention": (False,)},
        )
    if data.on_damage == "skip":
        yield Problem(
            "`data.on_damage` skip does not work with `model.objective` translation, where every "
            "rank reads all pairs before training; set it to stop",
            ("data.on_damage", "model.objective"),
            {"data.on_damage": ("stop",)},
        )


def unequal_batches(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    """Buckets of pairs contain varying numbers of sequences."""
    if config.model.objective != "translation":
        return
    if router.group_sequences > 1:
        yield Problem(
            f"`{path}.group_sequences` is {router.group_sequences}, but with `model.objective` "
            "translation the number of sequences changes from one micro-batch to the next; set "
            "it to 1",
            (f"{path}.group_sequences", "model.objective"),
            {f"{path}.group_sequences": (1,)},
        )
    if router.balance.scope == "global_batch":
        yield Problem(
            f"`{path}.balance.scope` is global_batch, but with `model.objective` translation the "
            "number of sequences changes from one micro-batch to the next; remove the scope and "
            f"set `{path}.balance.bias_rate`, which counts whole steps",
            (f"{path}.balance.scope", "model.objective"),
        )


def objective_notes(config: Config) -> Iterator[str]:
    """Say why losses are not those of a causal model, if they are not."""
    if reason := config.model.looks_ahead:
        yield f"losses and perplexities do not compare with other models': {reason}"
    for name, router in config.model.routers().items():
        if config.model.objective == "causal" and router.sees_group_in_training:
            yield (
                f"model.{name}: in training, a token's experts depend on later tokens, so training "
                "losses and perplexities are not those of a causal model; validation, evaluation "
                "and generation use running statistics instead, where tokens see no later ones"
            )
