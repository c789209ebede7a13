"""Check whether a configuration fits a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from moa_dist.config.changes import covers
from moa_dist.config.run import Config
from moa_dist.config.suggest import divisors, multiples_near, nearest, one_of
from moa_dist.errors import Problem

WORLD_SIZE = "world_size"
"""Stands among a problem's suggestions for the number of ranks, which is not a field."""


def find_layout_problems(
    config: Config, world_size: int, consumed: int | None = None
) -> list[Problem]:
    """Return why a configuration cannot run on `world_size` ranks, with the nearest fixes.

    Every fix also passes all other checks. `consumed` is the number of samples of the checkpoint
    that the run would continue. If these ranks cannot, no setting helps, and only that is reported.
    """
    ranks = f"{world_size} ranks" if world_size > 1 else "1 rank"
    sizes = nearest(world_size, _fitting_sizes(config, consumed))
    if consumed is not None and consumed % world_size and not _has_buckets(config):
        others = _start(sizes) if sizes else "start a number that divides them"
        text = f"its checkpoint has consumed {consumed} samples, which do not divide by {ranks}"
        return [
            Problem(f"{ranks} cannot continue this run: {text}; {others}", (), {WORLD_SIZE: sizes})
        ]
    return [
        *_expert_parallel(config, world_size, ranks, sizes),
        *_readers(config, world_size, ranks, sizes, continues=bool(consumed)),
        *_traced_ranks(config, world_size, ranks),
        *_batches(config, world_size, ranks),
    ]


def fitting_micro_batches(config: Config, per_rank: int) -> list[int]:
    """Return the micro-batches of which `per_rank` samples consist, and routers' groups allow."""
    groups = [router.group_sequences for router in config.model.routers().values()]
    return [m for m in divisors(per_rank) if not any(m % group for group in groups)]


def _has_buckets(config: Config) -> bool:
    """Return whether ranks share buckets of pairs, from any sample on and by no reader."""
    return config.model.objective == "translation"


def _fitting_sizes(config: Config, consumed: int | None) -> list[int]:
    """Return the numbers of ranks on which the run could start without changing any setting."""
    shared = [config.train.global_batch // config.train.micro_batch]
    if not _has_buckets(config):
        shared += [config.data.readers, consumed or 0]
    ep, traced = config.parallel.expert_parallel, max(config.profile.ranks, default=0)
    least = 1 if config.profile.steps is None else traced + 1
    sizes = [size for size in divisors(gcd(*shared)) if size % ep == 0 and size >= least]
    if list(_global_scopes(config)):
        return [size for size in sizes if size == shared[0]]
    return sizes


def _start(sizes: list[int]) -> str:
    return f"start {one_of(sizes)} {'rank' if sizes == [1] else 'ranks'}"


def _or_start(sizes: list[int]) -> str:
    return f", or {_start(sizes)}" if sizes else ""


def _expert_parallel(
    config: Config, world_size: int, ranks: str, sizes: list[int]
) -> Iterator[Problem]:
    key, ep = "parallel.expert_parallel", config.parallel.expert_parallel
    if world_size % ep:
        experts = [part.num_flat_experts for part in config.model.routed_parts().values()]
        most = min(experts, default=1)
        fitting = nearest(ep, (size for size in divisors(world_size) if size <= most))
        yield Problem(
            f"`{key}` is {ep}, which does not divide {ranks}; use {one_of(fitting)}"
            f"{_or_start(sizes)}",
            (key,),
            {key: fitting, WORLD_SIZE: sizes},
        )


def _readers(
    config: Config, world_size: int, ranks: str, sizes: list[int], *, continues: bool
) -> Iterator[Problem]:
    key, readers = "data.readers", config.data.readers
    if readers % world_size and not _has_buckets(config):
        fitting = multiples_near(readers, world_size)
        needed = continues and not any(
            covers(name, key) for name in config.checkpoint.allow_changes
        )
        also = f", and needs 'checkpoint.allow_changes=[{key}]'" if needed else ""
        yield Problem(
            f"{ranks} need `{key}` to be a multiple of {world_size}; it is {readers}. Use "
            f"{one_of(fitting)} (this changes the order of samples{also}){_or_start(sizes)}",
            (key,),
            {key: fitting, WORLD_SIZE: sizes},
        )


def _traced_ranks(config: Config, world_size: int, ranks: str) -> Iterator[Problem]:
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.steps is not None and absent:
        yield Problem(
            f"`profile.ranks` contains rank {absent[0]}, but {ranks} are numbered from 0; use "
            f"ranks up to {world_size - 1}",
            ("profile.ranks",),
            {"profile.ranks": range(world_size)},
        )


def _batches(config: Config, world_size: int, ranks: str) -> Iterator[Problem]:
    total, micro = config.train.global_batch, config.train.micro_batch
    step, per_rank = world_size * micro, 0 if total % world_size else total // world_size
    scopes = list(_global_scopes(config))
    if total % step:
        batches = [step] if scopes else multiples_near(total, step)
        fitting = fitting_micro_batches(config, per_rank) if per_rank else []
        fitting = [m for m in fitting if m == per_rank] if scopes else nearest(micro, fitting)
        advice = f"use a global batch of {one_of(batches)}"
        if fitting:
            advice += f", or a micro-batch of {one_of(fitting)}"
        yield Problem(
            f"`train.global_batch` is {total}, which is not a multiple of {ranks} x "
            f"`train.micro_batch` {micro} = {step}; {advice}",
            ("train.global_batch", "train.micro_batch"),
            {"train.global_batch": batches, "train.micro_batch": fitting},
        )
    elif total > step:
        for balance in scopes:
            yield Problem(
                f"`{balance}.scope` is global_batch, but {ranks} accumulate {total // step} "
                "micro-batches per step, so no forward sees all its tokens; use "
                f"`train.micro_batch` = {per_rank}, or remove the scope and set "
                f"`{balance}.bias_rate`, which counts whole steps",
                (f"{balance}.scope", "train.micro_batch"),
                {"train.micro_batch": (per_rank,)},
            )


def _global_scopes(config: Config) -> Iterator[str]:
    """Yield the `balance` sections whose losses need the whole batch in one forward."""
    for name, router in config.model.routers().items():
        if router.balance.scope == "global_batch":
            yield f"model.{name}.balance"
