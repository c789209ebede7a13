"""Draws the load of experts as pictures for TensorBoard.

Drawn with Pillow, which TensorBoard needs anyway; matplotlib is an optional dependency. Shapes: R
rows, C columns of experts, H and W pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from moa_dist.models.calls import RouterCall
from moa_dist.moe.statistics import RoutingReport

_GRID_WIDTH, _NARROWEST, _WIDEST = 640, 3, 40
"""Approximate width of all cells, and limits of one cell's width, in pixels."""
_ROW, _LINE, _GAP = 18, 18, 8
"""Height of a row of cells and of a line of text, and the space between parts, in pixels."""
_FONT_SIZE = 12
_TICK = 28
"""Minimum distance between two expert numbers, in pixels."""
_BAR_WIDTH = 200
_FEW, _EVEN, _MANY = (33, 102, 172), (247, 247, 247), (178, 24, 43)
"""Colors of (almost) no load, the mean load, and twice the mean or more."""
_DEAD = (0, 0, 0)
_INK, _PAPER = (0, 0, 0), (255, 255, 255)


def load_pictures(routing: dict[RouterCall, RoutingReport]) -> dict[str, NDArray[np.uint8]]:
    """Draw one picture [H, W, 3] per router name: a row per layer and repeat, a column per expert.

    Colors run from blue through white (the router call's mean load) to red (twice the mean or
    more); experts without a token are black. The scale is fixed, so that pictures of different
    steps can be compared.
    """
    calls: dict[str, list[RouterCall]] = {}
    for call in sorted(routing):
        calls.setdefault(call.router, []).append(call)
    return {
        router: _draw(
            f"{router}: load of each expert, relative to the mean of its row",
            [f"L{call.layer} R{call.repeat}" for call in of_router],
            np.stack([load_colors(routing[call]) for call in of_router]),
            num_groups=len(routing[of_router[0]].load),
        )
        for router, of_router in calls.items()
    }


def load_colors(report: RoutingReport) -> NDArray[np.uint8]:
    """Return the color of each expert in a picture, [C, 3]."""
    load_C = report.load.flatten().double().numpy()
    colors_C3 = _colors(load_C / (load_C.mean() or 1.0))
    colors_C3[load_C == 0] = _DEAD
    return colors_C3


def _colors(relative_C: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the colors [C, 3] of loads relative to the mean."""
    scale = np.array([_FEW, _EVEN, _MANY], dtype=np.float64)
    channels = [np.interp(relative_C, (0.0, 1.0, 2.0), scale[:, i]) for i in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _draw(
    title: str, rows: list[str], colors_RC3: NDArray[np.uint8], num_groups: int
) -> NDArray[np.uint8]:
    """Draw cells with a title, row labels, expert numbers and the color scale."""
    num_rows, num_columns, _ = colors_RC3.shape
    font = ImageFont.load_default(_FONT_SIZE)
    cell = min(max(_GRID_WIDTH // num_columns, _NARROWEST), _WIDEST)
    left = _GAP + math.ceil(max(font.getlength(row) for row in rows)) + _GAP
    top = _GAP + _LINE
    bottom = top + num_rows * _ROW
    needed = max(left + num_columns * cell, _GAP + math.ceil(font.getlength(title)), 2 * _BAR_WIDTH)
    height = bottom + 2 * _LINE + 2 * _GAP + 2 * _LINE
    image = Image.new("RGB", (needed + 3 * _GAP, height), _PAPER)
    cells = Image.fromarray(colors_RC3.repeat(_ROW, axis=0).repeat(cell, axis=1))
    image.paste(cells, (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((_GAP, _GAP), title, _INK, font)
    for i, row in enumerate(rows):
        draw.text((left - _GAP, top + (i + 0.5) * _ROW), row, _INK, font, anchor="rm")
    for column in range(0, num_columns, math.ceil(_TICK / cell)):
        x = left + (column + 0.5) * cell
        draw.line((x, bottom, x, bottom + 3), _INK)
        draw.text((x, bottom + 4), str(column), _INK, font, anchor="ma")
    experts = "expert" if num_groups == 1 else "expert; lines separate heads"
    draw.text((left, bottom + _LINE), experts, _INK, font)
    for group in range(1, num_groups):
        x = left + group * (num_columns // num_groups) * cell
        draw.line((x, top, x, bottom), _INK)
    _draw_scale(image, draw, font, (left, bottom + 2 * _LINE + _GAP))
    return np.asarray(image)


def _draw_scale(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    at: tuple[int, int],
) -> None:
    """Draw the color scale, with its numbers, below the cells."""
    left, top = at
    image.paste(Image.new("RGB", (_LINE, _LINE // 2), _DEAD), at)
    draw.text((left + _LINE // 2, top + _LINE // 2 + 2), "none", _INK, font, anchor="ma")
    left += 2 * _LINE + _GAP
    bar = _colors(np.linspace(0.0, 2.0, _BAR_WIDTH))[None].repeat(_LINE // 2, axis=0)
    image.paste(Image.fromarray(bar), (left, top))
    for share, text in ((0.0, "0"), (0.5, "mean"), (1.0, "2 x mean or more")):
        x, y = left + share * _BAR_WIDTH, top + _LINE // 2 + 2
        draw.text((x, y), text, _INK, font, anchor="ma")
