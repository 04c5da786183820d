# SPDX-License-Identifier: Apache-2.0
"""The picture as a tree for a terminal. A node with several users is drawn under the first of them."""

from __future__ import annotations

from dataclasses import dataclass

from target.drawing.picture import LEGEND, Box, Kind, Line, Picture, shorten

COLOURS = {
    Kind.CLIENT: "90",
    Kind.EXPORT: "35",
    Kind.USER: "37",
    Kind.FILTER: "33",
    Kind.FORMAT: "34",
    Kind.STORAGE: "32",
}
NAME_LENGTH = 60


@dataclass
class _Row:
    branch: str
    box: Box
    role: str
    cells: list[str]

    @property
    def head(self) -> str:
        role = f"{self.role}: " if self.role else ""
        return self.branch + role + shorten(self.box.name, NAME_LENGTH)


def draw(picture: Picture, colour: bool = False) -> str:
    """Lines of text, with colours for a terminal that has them."""
    rows: list[_Row] = []
    seen: set[str] = set()
    for top in _tops(picture):
        _walk(picture, top, None, "", "", rows, seen)
    widths = [max((len(row.cells[i]) for row in rows), default=0) for i in range(4)]
    head = max((len(row.head) for row in rows), default=0)
    lines = [_format(row, head, widths, colour) for row in rows]
    if not rows:
        lines.append("There are no nodes.")
    lines.append(f"needs/lets others: {LEGEND}" + _measured(picture))
    return "\n".join(lines) + "\n"


def _measured(picture: Picture) -> str:
    return f"; traffic over {picture.seconds:.1f} s" if picture.seconds else ""


def _tops(picture: Picture) -> list[Box]:
    """Clients are told with their export, which is what a tree begins with."""
    clients = {key for key, box in picture.boxes.items() if box.kind is Kind.CLIENT}
    used = {line.below for line in picture.lines if line.above not in clients}
    return [box for key, box in picture.boxes.items() if key not in used and key not in clients]


def _walk(
    picture: Picture, box: Box, line: Line | None, branch: str, stem: str, rows: list[_Row], seen: set[str]
) -> None:
    again = box.key in seen
    rows.append(_Row(branch, box, line.role if line else "", _cells(box, line, again)))
    if again:
        return
    seen.add(box.key)
    below = picture.below(box.key)
    for client in _clients(picture, box):
        bar = "│ " if below else "  "
        rows.append(_Row(f"{stem}{bar}◦ ", client, "", _cells(client, None, False)))
    for i, used in enumerate(below):
        last = i == len(below) - 1
        corner, bar = ("└─ ", "   ") if last else ("├─ ", "│  ")
        _walk(picture, picture.boxes[used.below], used, stem + corner, stem + bar, rows, seen)


def _clients(picture: Picture, box: Box) -> list[Box]:
    above = [picture.boxes[line.above] for line in picture.lines if line.below == box.key]
    return [user for user in above if user.kind is Kind.CLIENT]


def _cells(box: Box, line: Line | None, again: bool) -> list[str]:
    perm = line.terms if line else ""
    if again:
        return [box.what, perm, "(see above)", ""]
    return [box.what, perm, ", ".join(box.notes), "; ".join(box.traffic.words if box.traffic else [])]


def _format(row: _Row, head: int, widths: list[int], colour: bool) -> str:
    name = shorten(row.box.name, NAME_LENGTH)
    shown = row.head
    if colour:
        shown = shown[: len(shown) - len(name)] + f"\x1b[1;{COLOURS[row.box.kind]}m{name}\x1b[0m"
    padding = " " * (head - len(row.head))
    cells = "  ".join(cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True))
    return f"{shown}{padding}  {cells}".rstrip()
