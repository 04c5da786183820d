# SPDX-License-Identifier: Apache-2.0
"""The picture as SVG, complete in itself: no style sheet, font or program is needed to show it."""

from __future__ import annotations

import math
import unicodedata
from xml.sax.saxutils import escape

from target.drawing.layout import Layout, Point, place
from target.drawing.picture import LEGEND, Box, Kind, Line, Picture

FONT = "system-ui, 'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
COLOURS = {  # of a box's head, its edge, and what is below the head
    Kind.CLIENT: ("#64748b", "#475569", "#f8fafc"),
    Kind.EXPORT: ("#7c3aed", "#5b21b6", "#faf5ff"),
    Kind.USER: ("#57534e", "#44403c", "#fafaf9"),
    Kind.FILTER: ("#b45309", "#92400e", "#fffbeb"),
    Kind.FORMAT: ("#1d4ed8", "#1e3a8a", "#eff6ff"),
    Kind.STORAGE: ("#047857", "#065f46", "#ecfdf5"),
}
INK, FAINT, PAPER, IDLE, BUSY = "#0f172a", "#64748b", "#ffffff", "#94a3b8", "#0284c7"
MARGIN, PADDING, HEAD, ROW = 28.0, 12.0, 30.0, 17.0
NAME, SMALL = 13.5, 11.5  # font sizes
LABEL = 14.0  # the height of a row beside a line
LEGEND_HEIGHT = 46.0
LEAST_WIDTH = 132.0


def draw(picture: Picture) -> str:
    """The whole document."""
    sizes = {key: _size(box, picture) for key, box in picture.boxes.items()}
    layout = place(sizes, [(line.above, line.below) for line in picture.lines])
    kinds = [kind for kind in Kind if any(box.kind is kind for box in picture.boxes.values())]
    width = max(layout.width, 560.0) + 2 * MARGIN
    height = layout.height + 2 * MARGIN + LEGEND_HEIGHT
    left = (width - layout.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        f' viewBox="0 0 {width:.0f} {height:.0f}" font-family="{FONT}" font-size="{SMALL}" fill="{INK}">',
        f"<title>{_text(_summary(picture))}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<g transform="translate({left:.1f} {MARGIN})">',
        *(_line(picture, line, route) for line, route in zip(picture.lines, layout.routes, strict=True)),
        *(_box(box, layout) for box in picture.boxes.values()),
        *(_label(line, route) for line, route in zip(picture.lines, layout.routes, strict=True)),
        "</g>",
        _legend(picture, kinds, width, height),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _summary(picture: Picture) -> str:
    nodes = sum(box.key.startswith("node ") for box in picture.boxes.values())
    exports = sum(box.kind is Kind.EXPORT for box in picture.boxes.values())
    return f"{nodes} block nodes, {exports} exports"


# ---- boxes ----


def _size(box: Box, picture: Picture) -> tuple[float, float]:
    head = _width(box.name, NAME, bold=True) + 14 + _width(box.what, SMALL)
    rows = box.rows
    inner = max([head, *(_width(row, SMALL) for row in rows)])
    body = 10 + ROW * len(rows) if rows else 0
    labels = [_label_width(line) + 14 for line in picture.lines if line.below == box.key]
    return max(inner + 2 * PADDING, LEAST_WIDTH, len(labels) * max(labels, default=0)), HEAD + body


def _width(text: str, size: float, bold: bool = False) -> float:
    """What the text takes at most in the fonts that may be there."""
    units = 0.0
    for char in text:
        if unicodedata.east_asian_width(char) in "WF":
            units += 1.0
        elif char in "iljtf.,:;'| !()[]/":
            units += 0.4
        else:
            units += 0.85 if char in "mwMW@%…" else 0.63 if char.islower() or char.isdigit() else 0.7
    return units * size * (1.07 if bold else 1.0)


def _box(box: Box, layout: Layout) -> str:
    placed = layout.boxes[box.key]
    head, edge, body = COLOURS[box.kind]
    width, height = placed.width, placed.height
    right = width - PADDING
    shape = f"M0 {HEAD}V8a8 8 0 0 1 8-8h{width - 16:.1f}a8 8 0 0 1 8 8V{HEAD}"
    if height == HEAD:
        shape = f"M0 {HEAD - 8}V8a8 8 0 0 1 8-8h{width - 16:.1f}a8 8 0 0 1 8 8v{HEAD - 16}"
        shape += "a8 8 0 0 1-8 8H8a8 8 0 0 1-8-8z"
    parts = [
        f'<g transform="translate({placed.x - width / 2:.1f} {placed.y:.1f})">',
        f"<title>{_text(' '.join([box.name, box.what, box.whole]).strip())}</title>",
        f'<rect width="{width:.1f}" height="{height:.1f}" rx="8" fill="{body}"/>',
        f'<path d="{shape}" fill="{head}"/>',
        f'<rect width="{width:.1f}" height="{height:.1f}" rx="8" fill="none" stroke="{edge}"/>',
        '<g fill="#fff">',
        f'<text x="{PADDING}" y="20" font-size="{NAME}" font-weight="600">{_text(box.name)}</text>',
        f'<text x="{right:.1f}" y="20" text-anchor="end" fill-opacity=".85">{_text(box.what)}</text>',
        "</g>",
    ]
    busy = set(box.traffic.words) if box.traffic else set()
    for i, row in enumerate(box.rows):
        colour = BUSY if row in busy else INK if i == 0 else FAINT
        y = HEAD + 18 + ROW * i
        parts.append(f'<text x="{PADDING}" y="{y:.1f}" fill="{colour}">{_text(row)}</text>')
    return "".join([*parts, "</g>"])


# ---- lines ----


def _line(picture: Picture, line: Line, route: list[Point]) -> str:
    """Thicker with more traffic; dashed where it only reads."""
    amount = picture.traffic_of(line).bytes
    colour = BUSY if amount else IDLE
    width = 1.4 + (min(math.log10(max(amount, 1)), 10) / 3.2 if amount else 0)
    straight = LABEL * len(line.rows) + 6
    dash = ' stroke-dasharray="5 4"' if line.reads_only else ""
    return (
        f'<path d="{_path(route, straight)}" fill="none" stroke="{colour}" stroke-width="{width:.1f}"'
        f' stroke-linecap="round"{dash}/>'
    )


def _path(route: list[Point], straight: float) -> str:
    """Curves, and a straight end beside which there is room for the label."""
    end_x, end_y = route[-1]
    points = [*route[:-1], (end_x, end_y - straight), (end_x, end_y)]
    x, y = points[0]
    words = [f"M{x:.1f} {y:.1f}"]
    for to_x, to_y in points[1:]:
        if abs(to_x - x) < 0.5:
            words.append(f"L{to_x:.1f} {to_y:.1f}")
        else:
            middle = (y + to_y) / 2
            words.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
    return "".join(words)


def _label_width(line: Line) -> float:
    return max((_width(row, SMALL) for row in line.rows), default=0.0)


def _label(line: Line, route: list[Point]) -> str:
    """Beside the line's lower end: the role, and below it what is needed and what others may do."""
    x, y = route[-1]
    rows = line.rows
    top = y - 8 - LABEL * len(rows)
    parts = []
    for i, row in enumerate(rows):
        style = f'fill="{INK}"' if row == line.role else f'fill="{FAINT}" font-size="10" font-family="{MONO}"'
        parts.append(f'<text x="{x + 6:.1f}" y="{top + 12 + LABEL * i:.1f}" {style}>{_text(row)}</text>')
    return "".join(parts)


# ---- legend ----


def _legend(picture: Picture, kinds: list[Kind], width: float, height: float) -> str:
    y = height - MARGIN
    end = width - MARGIN
    parts = [f'<line x1="{MARGIN}" x2="{end:.0f}" y1="{y - 26:.0f}" y2="{y - 26:.0f}" stroke="#e2e8f0"/>']
    x = MARGIN
    for kind in kinds:
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="12" height="12" rx="3" fill="{COLOURS[kind][0]}"/>'
        )
        parts.append(f'<text x="{x + 17:.1f}" y="{y - 3:.1f}" fill="{FAINT}">{kind.value}</text>')
        x += 34 + _width(kind.value, SMALL)
    words = f"needs / lets others: {LEGEND}"
    if picture.seconds:
        words += f"; traffic over {picture.seconds:.1f} s"
    parts.append(f'<text x="{MARGIN}" y="{y + 15:.1f}" font-size="10" fill="{FAINT}">{_text(words)}</text>')
    return "".join(parts)


def _text(text: str) -> str:
    """Escaped, and without what XML cannot hold."""
    return escape("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))
