# SPDX-License-Identifier: Apache-2.0
"""The results as one SVG picture: IOPS of every server relative to the row's peer, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.bench.rows import LIMIT_CALLS, LIMIT_RING, LIMITS, NBDKIT, QEMU_NBD, QSD, ROWS, TARGET, Row
from tests.bench.summary import Results

_LEFT, _RIGHT, _TOP, _LINE, _WIDTH = 260, 70, 74, 24, 960
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_COLOURS = {
    TARGET: "#1f5fbf",
    QSD: "#c2571a",
    QEMU_NBD: "#8a6d1f",
    NBDKIT: "#2c7d4f",
    LIMIT_RING: "#777777",
    LIMIT_CALLS: "#777777",
}
_FONT = 'font-family="sans-serif" font-size="12"'


class Axis:
    """From ratios to x coordinates."""

    def __init__(self, ratios: Sequence[float]) -> None:
        self.low = max((t for t in _TICKS if t <= min([*ratios, 0.9])), default=_TICKS[0])
        self.high = min((t for t in _TICKS if t >= max([*ratios, 1.1])), default=_TICKS[-1])

    @property
    def ticks(self) -> list[float]:
        return [tick for tick in _TICKS if self.low <= tick <= self.high]

    def x(self, ratio: float) -> float:
        """What lies outside is shown at the edge."""
        part = math.log(min(max(ratio, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)


def svg(results: Results) -> str:
    """The picture; rows whose peer was not measured are left out."""
    rows = [row for row in ROWS if results.value(row.name, row.reference, "iops")]
    points = {row.name: _points(results, row) for row in rows}
    axis = Axis([ratio for found in points.values() for ratio in found.values()])
    height = _TOP + _LINE * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {_FONT}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _legend(results),
        _grid(axis, _TOP, _TOP + _LINE * len(rows)),
        *(_row(row, points[row.name], axis, _TOP + _LINE * i) for i, row in enumerate(rows)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _points(results: Results, row: Row) -> dict[str, float]:
    reference = results.value(row.name, row.reference, "iops")
    assert reference
    found = ((backend, results.value(row.name, backend, "iops")) for backend in row.backends())
    return {backend: value / reference for backend, value in found if value}


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _mark(backend: str, x: float, y: float) -> str:
    """Ours is a large dot, peers are small ones, the limit is a diamond."""
    colour = _COLOURS[backend]
    if backend in LIMITS:
        fill = "none" if backend == LIMIT_RING else colour
        return f'<path d="M{x:.1f} {y - 5}l5 5l-5 5l-5 -5z" fill="{fill}" stroke="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y}" r="{6 if backend == TARGET else 4}" fill="{colour}"/>'


def _legend(results: Results) -> str:
    measured = {backend for cells in results.cells.values() for backend in cells}
    parts, x = [], 14.0
    for backend in (name for name in _COLOURS if name in measured):
        parts += [_mark(backend, x, 18), _text(x + 10, 22, backend)]
        x += 28 + 7.2 * len(backend)
    parts += [f'<path d="M{x:.1f} 10v16" stroke="#b00020" stroke-width="2"/>', _text(x + 8, 22, "bar")]
    title = "IOPS relative to qemu-storage-daemon (vhost) or to nbdkit file (nbd); more is better"
    return "\n".join([*parts, _text(14, 46, title, more='fill="#444444"')])


def _grid(axis: Axis, top: float, bottom: float) -> str:
    parts = []
    for tick in axis.ticks:
        x, colour = axis.x(tick), "#888888" if tick == 1 else "#dddddd"
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{colour}"/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}x", "middle"))
    return "\n".join(parts)


def _row(row: Row, points: dict[str, float], axis: Axis, top: float) -> str:
    y = top + _LINE / 2
    parts = [_text(_LEFT - 12, y + 4, row.name, "end")]
    for bar in row.bars:
        if bar.measure == "iops" and bar.against == row.reference:
            x = axis.x(bar.times)
            parts.append(f'<path d="M{x:.1f} {y - 9}v18" stroke="#b00020" stroke-width="2"/>')
    # Ours is drawn last, above the others.
    parts += [_mark(backend, axis.x(ratio), y) for backend, ratio in reversed(points.items())]
    if TARGET in points:
        parts.append(_text(_WIDTH - 8, y + 4, f"{points[TARGET]:.2f}x", "end"))
    return "\n".join(parts)
