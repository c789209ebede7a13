"""Bars as SVG, and what all pictures share. The page defines colors by class, `f0` to `f7`.

Sizes are in units of the picture, which the page shows as about a pixel each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moa_dist.report.scale import readable

NUM_COLORS = 8
NARROW, WIDE = (520, 250), (800, 300)
"""Sizes of a line chart: half as wide as the page, or as wide."""
_BAR, _BAR_GAP, _BAR_LABELS, _BAR_TOTALS = 16, 7, 210, 70


@dataclass(frozen=True)
class Bar:
    """One row of stacked values, none negative."""

    label: str
    parts: dict[str, float]
    """Values by part, in the order in which they are stacked."""


def bar_chart(title: str, bars: Sequence[Bar], colors: dict[str, int], unit: str) -> str:
    """Draw horizontal bars, one below the other, with their sums; empty if all are zero."""
    longest = max((sum(bar.parts.values()) for bar in bars), default=0.0)
    if not longest:
        return ""
    width = WIDE[0]
    room = width - _BAR_LABELS - _BAR_TOTALS
    inside = []
    for i, bar in enumerate(bars):
        y, x = i * (_BAR + _BAR_GAP), float(_BAR_LABELS)
        middle = y + _BAR * 0.75
        inside.append(
            f'<text x="{_BAR_LABELS - 8}" y="{middle}" class="end">{escape(bar.label)}</text>'
        )
        for part, value in bar.parts.items():
            length = value / longest * room
            inside.append(
                f'<rect class="f{colors[part]}" x="{x:.1f}" y="{y}" width="{length:.1f}" '
                f'height="{_BAR}"><title>{escape(part)}: {readable(value)} {unit}</title></rect>'
            )
            x += length
        total = readable(sum(bar.parts.values()))
        inside.append(f'<text x="{x + 6:.1f}" y="{middle}">{total}</text>')
    about = f"{title}, in {unit}, of {len(bars)} rows; the table below has the numbers"
    return picture(title, about, (width, len(bars) * (_BAR + _BAR_GAP)), inside)


def picture(
    title: str, about: str, size: tuple[int, int], inside: Sequence[str], *, hover: str = ""
) -> str:
    """Wrap `inside` as an SVG that screen readers can read out; `hover` is an attribute."""
    return (
        f'<svg role="img" viewBox="0 0 {size[0]} {size[1]}" aria-label="{escape(about)}"{hover}>'
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>{''.join(inside)}</svg>"
    )
