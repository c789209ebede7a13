"""Check whether a configuration fits a number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.run import Config
from moa_dist.config.suggest import divisors, multiples_near, nearest, one_of
from moa_dist.errors import Problem

WORLD_SIZE = "world_size"
"""Stands among a problem's suggestions for the number of ranks, which is not a field."""


def find_layout_problems(config: Config, world_size: int) -> list[Problem]:
    """Return why a configuration cannot run on `world_size` ranks, with the nearest fixes."""
    ranks = f"{world_size} ranks" if world_size > 1 else "1 rank"
    return [
        *_expert_parallel(config, world_size, ranks),
        *_readers(config, world_size, ranks),
        *_traced_ranks(config, world_size, ranks),
        *_batches(config, world_size, ranks),
    ]


def _expert_parallel(config: Config, world_size: int, ranks: str) -> Iterator[Problem]:
    key, ep = "parallel.expert_parallel", config.parallel.expert_parallel
    if world_size % ep:
        fitting, sizes = nearest(ep, divisors(world_size)), multiples_near(world_size, ep)
        yield Problem(
            f"`{key}` is {ep}, which does not divide {ranks}; use {one_of(fitting)}, or start "
            f"{one_of(sizes)} ranks",
            (key,),
            {key: fitting, WORLD_SIZE: sizes},
        )


def _readers(config: Config, world_size: int, ranks: str) -> Iterator[Problem]:
    key, readers = "data.readers", config.data.readers
    if readers % world_size and config.model.objective != "translation":
        fitting, sizes = multiples_near(readers, world_size), nearest(world_size, divisors(readers))
        yield Problem(
            f"{ranks} need `{key}` to be a multiple of {world_size}; it is {readers}. Use "
            f"{one_of(fitting)} (this changes the order of samples), or start {one_of(sizes)} "
            "ranks",
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
    step = world_size * micro
    if total % step:
        batches = multiples_near(total, step)
        fitting = [] if total % world_size else nearest(micro, divisors(total // world_size))
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
        yield from _global_balance(config, total // step, total // world_size, ranks)


def _global_balance(
    config: Config, accumulated: int, largest: int, ranks: str
) -> Iterator[Problem]:
    for name, router in config.model.routers().items():
        if router.balance.scope == "global_batch":
            balance = f"model.{name}.balance"
            yield Problem(
                f"`{balance}.scope` is global_batch, but {ranks} accumulate {accumulated} "
                "micro-batches per step, so no forward sees all its tokens; use "
                f"`train.micro_batch` = {largest}, or remove the scope and set "
                f"`{balance}.bias_rate`, which counts whole steps",
                (f"{balance}.scope", "train.micro_batch"),
                {"train.micro_batch": (largest,)},
            )
