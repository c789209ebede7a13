"""What `moa-dist analyze` found, as figures of a run's page or as a page of its own."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from moa_dist.analyze.headline import Headline, headline
from moa_dist.analyze.panels import Panel, Plate, plates, router_title
from moa_dist.analyze.results import Analysis, RouterResult
from moa_dist.analyze.summary import named
from moa_dist.report.heatmap import Shades, heatmap, key
from moa_dist.report.html import document, figure, fold, section, table
from moa_dist.report.scale import readable

_SQUARE = 12
"""From so many rows on, a panel has half the page's width."""


def analysis_page(analysis: Analysis) -> str:
    """A whole page."""
    header = f"<header><h1>{escape(analysis.name)}</h1></header>"
    return document(analysis.name, [header, *analysis_sections(analysis)])


def analysis_sections(analysis: Analysis) -> Iterator[str]:
    """Sections for a page."""
    about = (
        f"After step {analysis.step:,}, on {analysis.tokens:,} tokens of {analysis.data}, in "
        f"sequences of {analysis.sequence_length:,}"
    )
    yield section("Experts and heads on held-out text", [_headlines(analysis.routers)], about)
    for plate in plates(analysis):
        figures = [_figure(plate, panel) for panel in plate.panels]
        yield section(plate.title, figures, plate.about, css="quarters")
    about = (
        "Tokens by pointwise mutual information with an expert, and how often they chose it; of "
        f"those that occur at least {analysis.min_count} times"
    )
    folded = [_tokens(router) for router in analysis.routers]
    yield section("What experts are chosen by", folded, about)


def _headlines(routers: list[RouterResult]) -> str:
    head = [
        "router", "experts per token", "fullest, x mean", "never chosen", "drops",
        "told by the token", "again in another repeat", "by chance", "serve one repeat",
        "different in all repeats",
    ]  # fmt: skip
    if not routers:
        return '<p class="none">The model has no experts.</p>'
    rows = [[router_title(router), *_cells(router, headline(router))] for router in routers]
    return f'<div class="card wide">{table(head, rows, "compare")}</div>'


def _cells(router: RouterResult, numbers: Headline) -> Iterator[str]:
    yield f"{router.choices} of {router.num_experts}"
    yield f"{numbers.imbalance:.2f}"
    yield str(numbers.dead)
    yield f"{numbers.dropped:.1%}"
    yield f"{numbers.explained:.1%}"
    depth = numbers.depth
    if depth is None:
        yield from ["-"] * 4
        return
    yield f"{depth.overlap:.1%}"
    yield f"{depth.chance:.1%}"
    yield f"{depth.single_repeat:.1%}"
    yield f"{depth.distinct:.1f} of {depth.most_distinct}"


def _figure(plate: Plate, panel: Panel) -> str:
    shades = Shades(panel.low, panel.high, panel.has_middle)
    is_large = len(panel.rows) >= _SQUARE or panel.values_RC.shape[1] > _SQUARE
    drawn = heatmap(
        panel.title,
        panel.values_RC,
        panel.rows,
        panel.columns,
        shades,
        about=f"{plate.title}, {panel.title}",
        width=520 if is_large else 250,
        num_groups=panel.num_groups,
    )
    numbers = ""
    if panel.values_RC.shape[1] <= _SQUARE:
        rows = [
            [row, *map(readable, values)]
            for row, values in zip(panel.rows, panel.values_RC.tolist(), strict=True)
        ]
        numbers = table(["", *map(str, range(panel.values_RC.shape[1]))], rows)
    body = drawn + key(shades, readable(panel.low), readable(panel.high))
    return figure(panel.title, "", body, numbers, css="half" if is_large else "")


def _tokens(router: RouterResult) -> str:
    load_E = router.load_RE.sum(0)
    rows = []
    for expert, tokens in enumerate(router.top_tokens):
        best = f"{tokens[0].pmi:.2f}, {tokens[0].share:.0%}" if tokens else "-"
        share = f"{load_E[expert] / max(load_E.mean(), 1e-9):.2f} x"
        rows.append([str(expert), share, best, named(tokens)])
    head = ["expert", "load", "first token's PMI, share", "tokens"]
    return fold(router_title(router), table(head, rows, "words"))
