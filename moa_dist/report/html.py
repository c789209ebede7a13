"""Building blocks of the page: text from files is escaped here, or where a picture is drawn."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from moa_dist.report.lines import Line
from moa_dist.report.scale import readable
from moa_dist.report.series import downsample

_MOST_ROWS = 24
_DOT = '<circle class="f{}" cx="9" cy="5" r="4"/>'


def document(title: str, body: Iterable[str]) -> str:
    """Return a page around the HTML `body` that loads nothing and runs only `hover.js`."""
    style, script = (
        files("moa_dist.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "hover.js")
    )
    # Whatever a file of the run may contain, browsers run no other script.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{script}</script></body></html>\n"
    )


def section(title: str, parts: Sequence[str], about: str = "", css: str = "") -> str:
    """Return figures or cards under a heading; empty without any."""
    if not parts:
        return ""
    description = f"<p>{escape(about)}</p>" if about else ""
    grid = f'<div class="grid {css}">{"".join(parts)}</div>'
    return f"<section><h2>{escape(title)}</h2>{description}{grid}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """Return a table of text cells; the first cell of each row names the row."""
    columns = "".join(f'<th scope="col">{breakable(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(title: str, about: str, body: str, numbers: str, *, css: str = "") -> str:
    """Return a picture with its caption and, folded below it, a table of the numbers."""
    folded = f"<details><summary>Numbers</summary>{numbers}</details>" if numbers else ""
    return (
        f'<figure class="card {css}"><figcaption><h3>{escape(title)}</h3>'
        f"<p>{escape(about)}</p></figcaption>{body}{folded}</figure>"
    )


def empty_figure(title: str, about: str, why: str, *, css: str = "") -> str:
    """Return a figure that says why it has no picture."""
    return figure(title, about, nothing(why), "", css=css)


def nothing(why: str) -> str:
    """Return a line that takes the place of what does not exist."""
    return f'<p class="none">{escape(why)}</p>'


def legend(entries: Iterable[tuple[str, int, str, bool]]) -> str:
    """Return a legend of (label, color, text after it, whether the curve has dots)."""
    items = "".join(
        f'<li><svg aria-hidden="true" width="18" height="10" viewBox="0 0 18 10">'
        f'<path class="line s{color}" d="M1 5H17"/>'
        f"{_DOT.format(color) if is_dotted else ''}</svg>"
        f"{escape(label)} <b>{escape(value)}</b></li>"
        for label, color, value, is_dotted in entries
    )
    return f'<ul class="legend">{items}</ul>'


def curve_table(
    lines: Sequence[Line], clock: Callable[[list[int]], Mapping[str, list[str]]] | None = None
) -> str:
    """Return a table of some steps of every curve, and of its extremes.

    `clock` returns what else to say about steps, by column.
    """
    columns: Mapping[str, list[str]] = {}
    rows: list[Sequence[str]] = []
    if lines:
        chosen = sorted({int(s) for ln in lines for s in downsample(ln.series, _MOST_ROWS).steps})
        if len(chosen) > _MOST_ROWS:
            every = -(-len(chosen) // _MOST_ROWS)
            chosen = sorted({*chosen[::every], chosen[-1]})
        by_step = [
            dict(zip(ln.series.steps.tolist(), ln.series.values.tolist(), strict=True))
            for ln in lines
        ]
        columns = clock(chosen) if clock else {}
        for i, step in enumerate(chosen):
            values = [readable(v[step]) if step in v else "" for v in by_step]
            rows.append([f"{step:,}", *(texts[i] for texts in columns.values()), *values])
    for name, pick in (("lowest", "argmin"), ("highest", "argmax")):
        cells = [name, *[""] * len(columns)]
        for line in lines:
            finite = line.series.finite()
            if not len(finite):
                cells.append("")
                continue
            i = int(getattr(finite.values, pick)())
            cells.append(f"{readable(finite.values[i])} (step {finite.steps[i]:,})")
        rows.append(cells)
    return table(["step", *columns, *(line.label for line in lines)], rows)


def breakable(name: str) -> str:
    """Escape a name, and let lines break after its separators before anywhere else."""
    return re.sub(r"([-_./]+)(?=\w)", r"\1<wbr>", escape(name))


def card(title: str, body: str) -> str:
    """Return HTML under a small heading, as wide as the page."""
    return f'<div class="card wide"><h3>{escape(title)}</h3>{body}</div>'


def fold(title: str, body: str, *, is_open: bool = False) -> str:
    """Return HTML that readers unfold by a click on its title."""
    state = " open" if is_open else ""
    return f'<details class="card wide"{state}><summary>{escape(title)}</summary>{body}</details>'
