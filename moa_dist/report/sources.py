"""What a run has read of each source of its data, and its loss on each folder of held-out data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from moa_dist.report.charts import NUM_COLORS
from moa_dist.report.curves import curves
from moa_dist.report.html import table
from moa_dist.report.lines import Axes, Line
from moa_dist.report.numbers import VALIDATION, Number, loss_basis
from moa_dist.report.progress import clock_texts, finite
from moa_dist.report.read import FOLDER_LOSS, SOURCE_EPOCHS, SOURCE_SHARE, Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series

_NONE = "-"
_LOSS = "nats per token"


def source_names(runs: Sequence[Run]) -> list[str]:
    """Return the sources and folders of held-out data of all runs, each name once."""
    names: dict[str, None] = {}
    for prefix in (SOURCE_SHARE, FOLDER_LOSS):
        for run in runs:
            names |= dict.fromkeys(run.group(prefix))
    return list(names)


def source_numbers(run: Run, name: str) -> list[Number]:
    """Return the share of a source, its epochs, and the loss on the held-out data of this name."""
    return [
        _last(run, f"{SOURCE_SHARE}{name}", "share of samples", "{:.2%}"),
        _last(run, f"{SOURCE_EPOCHS}{name}", "epochs", "{:.2f}"),
        _validation_loss(run, name),
    ]


def _last(run: Run, series: str, label: str, form: str) -> Number:
    known = finite(run, series)
    if not len(known):
        return Number(label, _NONE)
    value, step = float(known.values[-1]), int(known.steps[-1])
    now = finite(run, "loss")
    is_over = bool(len(now)) and step < int(now.steps[-1])
    return Number(label, form.format(value), f"until step {step:,}" if is_over else "", value)


def _validation_loss(run: Run, name: str) -> Number:
    label, known = "validation loss", finite(run, f"{FOLDER_LOSS}{name}")
    if not len(known):
        return Number(label, _NONE)
    value, step = float(known.values[-1]), int(known.steps[-1])
    i = int(known.values.argmin())
    detail = f"lowest {readable(known.values[i])} at step {known.steps[i]:,}"
    basis = loss_basis(run, VALIDATION, step)
    return Number(label, readable(value), detail, value, basis=basis)


def source_figures(run: Run) -> Iterator[str]:
    """Yield a table of the sources and, of several, how shares and losses have changed."""
    names = source_names([run])
    if not names:
        return
    numbers = {name: source_numbers(run, name) for name in names}
    head = ["", *(number.label for number in numbers[names[0]])]
    rows = [
        [name, *("\n".join(filter(None, [each.text, each.detail])) for each in found)]
        for name, found in numbers.items()
    ]
    yield f'<div class="card wide">{table(head, rows, "compare numbers")}</div>'
    colors = {name: i % NUM_COLORS for i, name in enumerate(names)}
    clock = partial(clock_texts, run)
    for prefix, title, about, unit, is_dotted in (
        (SOURCE_SHARE, "Shares of sources", "Of all samples so far", "share", False),
        (FOLDER_LOSS, "Validation loss by folder", "The same as above, apart", _LOSS, True),
    ):
        found = run.group(prefix)
        if len(found) > 1:
            axes = Axes(unit, marks=run.starts, clock=clock)
            yield curves(title, about, _lines(found, colors, is_dotted=is_dotted), axes)


def _lines(found: dict[str, Series], colors: dict[str, int], *, is_dotted: bool) -> list[Line]:
    return [Line(name, series, colors[name], is_dotted) for name, series in found.items()]
