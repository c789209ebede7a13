"""What does not go together with a model's objective."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.model import RouterConfig
from moa_dist.config.problem import Problem
from moa_dist.config.run import Config


def translation(config: Config) -> Iterator[Problem]:
    """Data is read as pairs, in buckets."""
    if config.model.objective != "translation":
        return
    data = config.data
    if data.bucket_tokens < data.sequence_length:
        yield Problem(
            f"`data.bucket_tokens` is {data.bucket_tokens}, less than the longest text, "
            f"`data.sequence_length` = {data.sequence_length}; a bucket must hold one pair",
            ("data.bucket_tokens", "data.sequence_length"),
        )
    if data.on_damage == "skip":
        yield Problem(
            "`data.on_damage` skip does not work with `model.objective` translation, where every "
            "rank reads all pairs before it starts; set it to stop",
            ("data.on_damage", "model.objective"),
        )


def unequal_batches(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    """Buckets of pairs hold different numbers of sequences."""
    if config.model.objective != "translation":
        return
    if router.group_sequences > 1:
        yield Problem(
            f"`{path}.group_sequences` is {router.group_sequences}, but with `model.objective` "
            "translation the number of sequences changes from one micro-batch to the next; set "
            "it to 1",
            (f"{path}.group_sequences", "model.objective"),
        )
    if router.balance.scope == "global_batch":
        yield Problem(
            f"`{path}.balance.scope` is global_batch, but with `model.objective` translation the "
            "number of sequences changes from one micro-batch to the next; leave the scope, and "
            f"set `{path}.balance.bias_rate`, which counts whole steps",
            (f"{path}.balance.scope", "model.objective"),
        )
