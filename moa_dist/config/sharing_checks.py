"""Checks of which layers repeat, what they share, and how tokens leave them."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.run import Config
from moa_dist.config.sharing import SharingConfig
from moa_dist.config.suggest import divisors, one_of
from moa_dist.errors import Problem


def repeats(config: Config) -> Iterator[Problem]:
    """Prelude and coda must leave layers between them, which the distinct ones divide."""
    model = config.model
    between, distinct = model.num_core_layers, model.num_distinct_layers
    if between < 1:
        yield Problem(
            f"`model.prelude` = {model.prelude} and `model.coda` = {model.coda} leave none of "
            f"`model.num_layers` = {model.num_layers}; together they must be fewer",
            ("model.prelude", "model.coda", "model.num_layers"),
        )
    elif distinct is not None and between % distinct:
        layers = f"`model.num_layers` = {model.num_layers}"
        if between < model.num_layers:
            layers = f"the {between} layers between `model.prelude` and `model.coda`"
        yield Problem(
            f"`model.num_distinct_layers` is {distinct}, which does not divide {layers}; use "
            f"{one_of(divisors(between))}",
            ("model.num_distinct_layers", "model.num_layers"),
            {"model.num_distinct_layers": divisors(between)},
        )
    if model.prelude_ffn is not None and not model.prelude:
        yield Problem(
            "`model.prelude_ffn` has no effect, as `model.prelude` is 0; give the number of layers "
            "that have it",
            ("model.prelude_ffn", "model.prelude"),
        )


def halting(config: Config) -> Iterator[Problem]:
    """Nothing halts before the first application."""
    model = config.model
    if model.halting is not None and model.num_core_layers == 1:
        yield Problem(
            "`model.halting` has no effect on a single layer; set it to null, or apply layers "
            "between `model.prelude` and `model.coda` more often",
            ("model.halting", "model.num_layers"),
            {"model.halting": (None,)},
        )


def sharing(config: Config) -> Iterator[Problem]:
    """What applications have of their own needs layers that are applied several times."""
    model, own = config.model, config.model.sharing.own
    if model.num_repeats < 2 and model.sharing != SharingConfig():
        yield Problem(
            "`model.sharing` has no effect, as no layer is applied twice; set "
            "`model.num_distinct_layers` to fewer than the layers between prelude and coda",
            ("model.sharing", "model.num_distinct_layers"),
        )
    shared = [part for name, part in model.parts().items() if name not in own]
    if "routers" in own and not any(part.routers for part in shared):
        yield Problem(
            "`model.sharing.own` lists routers, but no part that is shared has any; remove them",
            ("model.sharing.own",),
        )
    if len(own) > len(set(own)):
        yield Problem("`model.sharing.own` lists a part twice", ("model.sharing.own",))
