"""Checks of where attention takes tokens to be, and how far it sees."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.run import Config
from moa_dist.errors import Problem


def rotations(config: Config) -> Iterator[Problem]:
    """Rotations must turn something, and slow down in a way that is defined."""
    attention = config.model.attention
    window = attention.window
    ropes = {
        "model.attention.rope": attention.rope,
        "model.attention.window.rope": None if window is None else window.rope,
    }
    for path, rope in ropes.items():
        if rope is None:
            continue
        if int(attention.d_head * rope.fraction) < 2:
            yield Problem(
                f"`{path}.fraction` = {rope.fraction:g} of `model.attention.d_head` = "
                f"{attention.d_head} rotates no dimension; their product must be at least 2, or "
                f"set `{path}` to null",
                (f"{path}.fraction", "model.attention.d_head"),
            )
        yield from rope.problems(path)


def window(config: Config) -> Iterator[Problem]:
    """Some layer must see all tokens if `full_every` or another rotation says so."""
    limit = config.model.attention.window
    if limit is None:
        return
    if limit.full_every is not None and limit.full_every > config.model.num_layers:
        yield Problem(
            f"`model.attention.window.full_every` is {limit.full_every}, more than "
            f"`model.num_layers` = {config.model.num_layers}, so no layer would see all tokens; "
            "use null for that",
            ("model.attention.window.full_every", "model.num_layers"),
            {"model.attention.window.full_every": (None,)},
        )
    if limit.rope is not None and limit.full_every is None:
        yield Problem(
            "`model.attention.window.rope` is for models that have full layers too; without "
            "`model.attention.window.full_every`, set `model.attention.rope`",
            ("model.attention.window.rope", "model.attention.window.full_every"),
        )
