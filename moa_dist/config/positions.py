"""Where attention takes tokens to be, and how far it sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from moa_dist.config.section import Section
from moa_dist.errors import Problem

_SHRUNK_WINDOW, _SHRUNK_PATTERN = 5, 2


class RopeScalingConfig(Section):
    """Slower rotations, for texts longer than those a model has learned from."""

    kind: Literal["linear", "yarn"]
    """`linear` slows every rotation by `factor` (Chen et al. 2023). `yarn` slows those that turn
    less than `slow_turns` within `original_length`, leaves those that turn more than `fast_turns`
    as they are, and blends between them (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""
    factor: Annotated[float, Field(ge=1)]
    """How much longer texts become."""
    original_length: PositiveInt | None = None
    """Longest text before the change, in tokens; of `yarn`, which needs it."""
    fast_turns: PositiveFloat = 32.0
    """See `yarn`; beta in the paper, `beta_fast` in transformers."""
    slow_turns: PositiveFloat = 1.0
    """See `yarn`; alpha in the paper, `beta_slow` in transformers."""
    attention_factor: PositiveFloat | None = None
    """Multiplies rotated queries and keys under `yarn`; null for 0.1 ln(factor) + 1."""
    whole_pairs: bool = True
    """Whether `yarn` rounds where it starts and stops to blend to whole pairs of dimensions;
    `truncate` in transformers."""

    def problems(self, path: str) -> Iterable[Problem]:
        """Report fields that are missing, or have no effect."""
        if self.kind == "yarn":
            if self.original_length is None:
                yield Problem(
                    f"`{path}.kind` yarn needs `{path}.original_length`: which rotations it slows "
                    "depends on the length that the model has learned from",
                    (f"{path}.original_length", f"{path}.kind"),
                )
            if self.slow_turns >= self.fast_turns:
                yield Problem(
                    f"`{path}.slow_turns` is {self.slow_turns:g}, not less than "
                    f"`{path}.fast_turns` = {self.fast_turns:g}",
                    (f"{path}.slow_turns", f"{path}.fast_turns"),
                )
            return
        for name in ("original_length", "fast_turns", "slow_turns", "attention_factor"):
            if getattr(self, name) != type(self).model_fields[name].default:
                yield Problem(
                    f"`{path}.{name}` has no effect on `{path}.kind` linear",
                    (f"{path}.{name}", f"{path}.kind"),
                )


class RopeConfig(Section):
    """Rotary position embedding, rotate-half pairing."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each head's dimensions that is rotated; the width is rounded down to even."""
    base: PositiveFloat = 10000.0
    """Wavelength base."""
    scaling: RopeScalingConfig | None = None
    """Slower rotations for longer texts; null for none."""

    def problems(self, path: str) -> Iterable[Problem]:
        """Report what is wrong with the scaling."""
        if self.scaling is None:
            return
        yield from self.scaling.problems(f"{path}.scaling")
        if self.scaling.kind == "yarn" and self.base <= 1:
            yield Problem(
                f"`{path}.base` is {self.base:g}, but yarn needs a base above 1, with which pairs "
                "of dimensions turn ever more slowly",
                (f"{path}.base", f"{path}.scaling.kind"),
            )


class WindowConfig(Section):
    """A limit on how far tokens see, in all layers or in most."""

    size: PositiveInt
    """Tokens that a query sees at most, itself and those before it; in a masked model and in an
    encoder, so many in both directions. Padding does not count. Attention to the source in a
    decoder that translates is never limited."""
    full_every: Annotated[int | None, Field(ge=2)] = None
    """Every so many layers one sees all tokens: with 4, the 4th, 8th, ... of `model.num_layers`.
    Repeats of a shared layer count, so one layer may see far in some repeats and not in others.
    Null for none. It is 2 in Gemma 2, 6 in Gemma 3, 4 in OLMo 3."""
    rope: RopeConfig | None = None
    """Rotary positions of layers with a limit, if they are others than those of full layers
    (another base in Gemma 3, no scaling in OLMo 3); null for the same."""

    def size_in(self, application: int) -> int | None:
        """Return the limit in an application of a layer, the first of which is 0; None for none."""
        is_full = self.full_every is not None and (application + 1) % self.full_every == 0
        return None if is_full else self.size

    def shrink(self) -> Self:
        """A small copy that still hides tokens; see `moa_dist.config.shrink`."""
        full_every = None if self.full_every is None else _SHRUNK_PATTERN
        return self.changed(size=min(self.size, _SHRUNK_WINDOW), full_every=full_every)
