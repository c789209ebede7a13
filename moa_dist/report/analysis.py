"""Figures of what `moa-dist analyze` found, for a run's page or a page of their own."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from moa_dist.analyze.headline import Headline, headline
from moa_dist.analyze.panels import Panel, Plate, plates, router_title
from moa_dist.analyze.results import Analysis, RouterResult
from moa_dist.analyze.summary import named
from moa_dist.report.heatmap import Grid, Shades, heatmap_figure
from moa_dist.report.html import document, fold, nothing, section, table
from moa_dist.report.scale import readable

_SQUARE = 12
"""Rows or columns from which a panel takes half of the page instead of a quarter."""


def analysis_page(analysis: Analysis) -> str:
    """Return a whole page about an analysis."""
    header = f"<header><h1>{escape(analysis.name)}</h1></header>"
    return document(analysis.name, [header, *analysis_sections(analysis)])


def analysis_sections(analysis: Analysis) -> Iterator[str]:
    """Yield the sections about an analysis."""
    about = (
        f"After step {analysis.step:,}, on {analysis.tokens:,} tokens of {analysis.data}, in "
        f"sequences of {analysis.sequence_length:,}"
    )
    yield section("Experts and heads on held-out text", [_headlines(analysis.routers)], about)
    for plate in plates(analysis):
        figures = [_figure(plate, panel) for panel in plate.panels]
        yield section(plate.title, figures, plate.about, css="quarters")
    about = (
        "Tokens by pointwise mutual information with an expert, and how often they chose it, among "
        f"those that occur at least {analysis.min_count} times"
    )
    folded = [_tokens(router) for router in analysis.routers]
    yield section("Which tokens choose an expert", folded, about)


def _headlines(routers: list[RouterResult]) -> str:
    head = [
        "router", "experts per token", "fullest, x mean", "never chosen", "drops",
        "explained by token identity", "reused across repeats", "expected at random",
        "used almost only in one repeat", "distinct over all repeats",
    ]  # fmt: skip
    if not routers:
        return nothing("The model has no experts.")
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
    is_large = len(panel.rows) >= _SQUARE or panel.values_RC.shape[1] > _SQUARE
    numbers = ""
    if panel.values_RC.shape[1] <= _SQUARE:
        rows = [
            [row, *map(readable, values)]
            for row, values in zip(panel.rows, panel.values_RC.tolist(), strict=True)
        ]
        numbers = table(["", *panel.columns], rows)
    grid = Grid(
        panel.values_RC,
        panel.rows,
        [f"{panel.axes[1]} {column}" for column in panel.columns],
        ends=(f"{panel.axes[1]} {panel.columns[0]}", panel.columns[-1]),
        num_groups=panel.num_groups,
    )
    return heatmap_figure(
        panel.title,
        "",
        grid,
        Shades(panel.low, panel.high, panel.has_middle),
        about=f"{plate.title}, {panel.title}",
        numbers=numbers,
        is_half=is_large,
    )


def _tokens(router: RouterResult) -> str:
    load_E = router.load_RE.sum(0)
    rows = []
    for expert, tokens in enumerate(router.top_tokens):
        best = f"{tokens[0].pmi:.2f}, {tokens[0].share:.0%}" if tokens else "-"
        share = f"{load_E[expert] / max(load_E.mean(), 1e-9):.2f} x"
        rows.append([str(expert), share, best, named(tokens)])
    head = ["expert", "load", "first token's PMI, share", "tokens"]
    return fold(router_title(router), table(head, rows, "words"))
