"""Checks of what works together with tokens that choose how often they recur."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.recursion import TokenChoiceConfig
from moa_dist.config.run import Config
from moa_dist.errors import Problem


def recursion(config: Config) -> Iterator[Problem]:
    """Recursion repeats all layers between prelude and coda together, for a part of the tokens."""
    model, data = config.model, config.data
    if (section := model.recursion) is None:
        return
    if model.num_repeats == 1:  # 0 is reported with the number of layers
        yield Problem(
            "`model.recursion` has no effect, as no layer is applied twice; set "
            "`model.num_distinct_layers` to fewer than the layers between prelude and coda",
            ("model.recursion", "model.num_distinct_layers"),
        )
    elif model.num_repeats > 1:
        yield from section.problems("model.recursion", model.num_repeats)
    # What it does not work with: the keys that rule it out, what is so about them, and why.
    reasons = {
        ("model.sharing.order",): (
            model.sharing.order != "cycle",
            "a recursion applies every layer once; set it to cycle",
        ),
        ("model.halting",): (
            model.halting is not None,
            "each says by itself when tokens leave layers that repeat; set one to null",
        ),
        ("model.attention", "model.ffn"): (
            any(router.is_recurrent for router in model.routers().values()),
            "states of recurrent routers are not packed; use other routers",
        ),
        ("model.objective",): (
            model.objective == "translation",
            "attention to a source is not packed; use another objective",
        ),
        ("model.attention.window",): (
            model.attention.window is not None,
            "a window counts tokens, some of which are missing; set it to null",
        ),
        ("model.attention.relative_positions",): (
            getattr(model.attention, "relative_positions", None) is not None,
            "a distance counts tokens, some of which are missing; set it to null",
        ),
        ("data.document_attention",): (
            data.document_attention,
            "how many tokens of a document recur is not known beforehand; set it to false",
        ),
        ("train.compile", "model.recursion.kind"): (
            config.train.compile and isinstance(section, TokenChoiceConfig),
            "the number of tokens that recur differs from step to step; use expert_choice",
        ),
    }
    for keys, (is_so, why) in reasons.items():
        if is_so:
            text = f"`model.recursion` does not work with this `{keys[0]}`: {why}"
            yield Problem(text, ("model.recursion", *keys))


def looking_ahead(config: Config) -> Iterator[Problem]:
    """A model whose tokens depend on later ones cannot continue or score texts."""
    if (reason := config.model.looks_ahead) is None:
        return
    for key, is_set in {
        "evaluation.tasks": bool(config.evaluation.tasks),
        "evaluation.samples.prompts": bool(config.evaluation.samples.prompts),
    }.items():
        if is_set:
            yield Problem(
                f"`{key}` need tokens that depend on earlier ones only, but {reason}; remove them",
                (key, "model.recursion.kind"),
            )
