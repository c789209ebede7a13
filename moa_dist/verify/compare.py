"""Compares one layout's step with the same step on one process, and defines what counts as equal.

Bounds are relative for values of any magnitude. For parameters after a step they are absolute,
because weights are of order one.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.models.calls import RouterCall
from moa_dist.verify.reference import Outcome

BOUNDS = {"fp64": 1e-9, "fp32": 1e-5}
"""Maximum deviation that counts as equal, by the precision of the layout's step."""
BF16_BOUND, BF16_GRADIENT_BOUND = 0.03, 0.3
"""Relative bounds. With 8 bits, some tokens choose other experts; a wrong factor gives >= 0.5."""


class Check(NamedTuple):
    """Holds one comparison of the layout with one process."""

    what: str
    """Name of the compared quantity."""
    deviation: float
    """Deviation of the first parameter that differs, or else the largest."""
    bound: float
    """Maximum deviation that counts as equal."""
    where: str = ""
    """Name of that parameter; empty if no parameters are compared."""

    @property
    def equal(self) -> bool:
        """Return whether the deviation is within the bound, which NaN is not."""
        return self.deviation <= self.bound


def compare_gradients(ours: Outcome, reference: Outcome, bound: float) -> list[Check]:
    """Compare an unclipped step of plain SGD, in which parameters change by the gradient."""
    return [
        _first_or_worst("initial parameters", 0.0, _differences(ours.initial, reference.initial)),
        Check("logits", _relative(ours.logits, reference.logits), bound),
        *_values(ours, reference, bound),
        Check("assignments per expert", _unequal(ours.load, reference.load), 0.0),
        Check("dropped assignments", _unequal(ours.dropped, reference.dropped), 0.0),
        _first_or_worst("gradients", bound, _gradient_differences(ours, reference)),
    ]


def compare_step(what: str, ours: Outcome, reference: Outcome, bound: float) -> Check:
    """Compare parameters after a step that tests clipping or the optimizer; absolute."""
    return _first_or_worst(what, bound, _differences(ours.parameters, reference.parameters))


def compare_updated_model(ours: Outcome, reference: Outcome, bound: float) -> Check:
    """Compare outputs after a step, which use parameters that other ranks may have updated."""
    deviation = _relative(ours.logits_after, reference.logits_after)
    return Check("logits after that step", deviation, bound)


def compare_bf16(ours: Outcome, reference: Outcome, experts: Set[str]) -> list[Check]:
    """Compare what 8 bits can resolve: values, and the gradients of experts and of the rest."""
    checks = [
        check._replace(what=f"{check.what} in bf16")
        for check in _values(ours, reference, BF16_BOUND)
    ]
    for what, names in (
        ("dense", [n for n in reference.initial if n not in experts]),
        ("expert", [n for n in reference.initial if n in experts]),
    ):
        if names:
            mine, theirs = (
                torch.cat([(o.parameters[n] - o.initial[n]).flatten() for n in names])
                for o in (ours, reference)
            )
            deviation = ((mine - theirs).norm() / theirs.norm()).item()
            checks.append(Check(f"{what} gradients in bf16", deviation, BF16_GRADIENT_BOUND))
    return checks


def _values(ours: Outcome, reference: Outcome, bound: float) -> list[Check]:
    assert ours.aux_losses.keys() == reference.aux_losses.keys()
    norm = reference.grad_norms[0]
    checks = [Check("loss", abs(ours.loss - reference.loss) / abs(reference.loss), bound)]
    for name, value in reference.aux_losses.items():
        # A value near zero needs no more digits than the loss that it is added to.
        scale = max(abs(value), 1e-4 * abs(reference.loss))
        deviation = abs(ours.aux_losses[name] - value) / scale
        checks.append(Check(f"auxiliary loss {name}", deviation, bound))
    deviation = max(abs(n - norm) / norm for n in ours.grad_norms)
    return [*checks, Check("gradient norm on every rank", deviation, bound)]


def _relative(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference).abs().max() / reference.abs().max()).item()


def _unequal(ours: dict[RouterCall, Tensor], reference: dict[RouterCall, Tensor]) -> float:
    """Count the router calls that differ."""
    assert ours.keys() == reference.keys()
    return float(sum(not ours[call].equal(value) for call, value in reference.items()))


def _differences(
    ours: dict[str, Tensor], reference: dict[str, Tensor]
) -> Iterable[tuple[str, float]]:
    for name, value in reference.items():
        yield name, (ours[name] - value).abs().max().item()


def _gradient_differences(ours: Outcome, reference: Outcome) -> Iterable[tuple[str, float]]:
    """Yield gradient deviations relative to the largest element of the parameter's gradient.

    The scale is at least a thousandth of the largest gradient of all, because gradients that nearly
    cancel in exact arithmetic consist of rounding errors.
    """
    steps = {n: reference.parameters[n] - reference.initial[n] for n in reference.initial}
    largest = {name: step.abs().max().item() for name, step in steps.items()}
    floor = 1e-3 * max(largest.values())
    for name, step in steps.items():
        difference = ours.parameters[name] - ours.initial[name] - step
        yield name, difference.abs().max().item() / max(largest[name], floor)


def _first_or_worst(what: str, bound: float, differences: Iterable[tuple[str, float]]) -> Check:
    """Return the first parameter in model order that differs, or else the largest deviation."""
    checks = [Check(what, deviation, bound, name) for name, deviation in differences]
    different = [check for check in checks if not check.equal]
    return different[0] if different else max(checks, key=lambda check: check.deviation)
