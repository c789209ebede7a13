"""How several runs compare: their numbers side by side, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moa_dist.report.curves import labels
from moa_dist.report.health import warnings
from moa_dist.report.html import fold, nothing, section, table
from moa_dist.report.numbers import Number, at_equal_tokens, headline, hosts, layout, software
from moa_dist.report.progress import state
from moa_dist.report.read import Run
from moa_dist.report.sources import source_names, source_numbers

_MOST_DIFFERENT = 16
"""Settings that differ, from which they are folded."""


def comparison(runs: Sequence[Run], now: float) -> Iterator[str]:
    """Yield the sections; `now` is the current time in seconds since 1970."""
    head = labels(runs)
    yield _side_by_side(runs, head, now)
    yield _sources(runs, head)
    yield _differences(runs, head)


def _side_by_side(runs: Sequence[Run], head: Sequence[str], now: float) -> str:
    rows = [
        ["State", *(state(run, now)[0] for run in runs)],
        ["Needs attention", *("\n".join(warnings(run, now)) or "nothing" for run in runs)],
    ]
    numbers = [*zip(*(headline(run) for run in runs), strict=True), at_equal_tokens(runs)]
    rows += [[each[0].label, *marked(each)] for each in numbers]
    about = "★ is the best where all runs compare: the same data, tokens read, experts or hardware"
    return _wide("Side by side", table(["", *head], rows, "compare numbers"), about)


def _sources(runs: Sequence[Run], head: Sequence[str]) -> str:
    """Compare what the runs have read of each source, and their losses on its held-out data."""
    rows = []
    for name in source_names(runs):
        for numbers in zip(*(source_numbers(run, name) for run in runs), strict=True):
            if any(number.value is not None for number in numbers):
                rows.append([f"{name}: {numbers[0].label}", *marked(numbers)])
    return _wide("Data", table(["", *head], rows, "compare numbers")) if rows else ""


def _differences(runs: Sequence[Run], head: Sequence[str]) -> str:
    settings = [
        {"layout": layout(run), "hosts": hosts(run), "software": software(run)} | _flat(run.config)
        for run in runs
    ]
    names = dict.fromkeys(name for values in settings for name in values if name != "name")
    different = [
        [name, *(values.get(name, "-") for values in settings)]
        for name in names
        if len({values.get(name) for values in settings}) > 1
    ]
    if not different:
        why = "Nothing: configurations, layout, hosts and software are the same."
        return _wide("What differs", nothing(why))
    # Models of different kinds have dozens of settings that the others lack.
    is_short = len(different) <= _MOST_DIFFERENT
    body = table(["", *head], different, "compare")
    title = "1 setting" if len(different) == 1 else f"{len(different)} settings"
    return section("What differs", [fold(title, body, is_open=is_short)])


def _wide(title: str, body: str, about: str = "") -> str:
    return section(title, [f'<div class="card wide">{body}</div>'], about)


def marked(numbers: Sequence[Number]) -> Iterator[str]:
    """Yield the runs' values and, below, details; the best gets a star if all compare and differ.

    Values that read the same do not differ, and one alone is not the best.
    """
    known = {n.value: n for n in numbers if n.value is not None}
    bases = {n.basis for n in known.values()}
    compares = len(bases) == 1 and None not in bases and len({n.text for n in known.values()}) > 1
    best = (max if numbers[0].better == "high" else min)(known, default=None)
    for number in numbers:
        is_best = compares and best is not None and number.text == known[best].text
        warning, star = "⚠ " if number.warns else "", " ★" if is_best else ""
        yield "\n".join(filter(None, [f"{warning}{number.text}{star}", number.detail]))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings of a nested configuration as text by path."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
