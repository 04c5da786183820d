# SPDX-License-Identifier: Apache-2.0
"""The picture for Mermaid, which many viewers of Markdown draw."""

from __future__ import annotations

from target.drawing.picture import PALE, Box, Kind, Line, Picture, shorten

NAME_LENGTH = 80


def draw(picture: Picture) -> str:
    """A flowchart; line labels hold the role, and what is needed / what others may do."""
    ids = {key: f"b{i}" for i, key in enumerate(picture.boxes)}
    lines = [
        "flowchart TD",
        *(f"  {ids[box.key]}[{_box(box)}]:::{_class(box.kind)}" for box in picture.boxes.values()),
        *(f"  {ids[line.above]} {_arrow(line)} {ids[line.below]}" for line in picture.lines),
        *(f"  classDef {_class(kind)} fill:{colour},color:#0f172a" for kind, colour in PALE.items()),
    ]
    return "\n".join(lines) + "\n"


def _class(kind: Kind) -> str:
    return kind.name.lower()


def _box(box: Box) -> str:
    words = [f"{shorten(box.name, NAME_LENGTH)} ({box.what})", *box.rows]
    return _quoted(words)


def _arrow(line: Line) -> str:
    arrow = "-.->" if line.reads_only else "-->"
    return f"{arrow}|{_quoted(line.rows)}|" if line.rows else arrow


def _quoted(words: list[str]) -> str:
    """Entities in place of all that has a meaning there."""
    joined = "<br/>".join(
        "".join(c if c.isalnum() or c in " ,.:/()-_" else f"#{ord(c)};" for c in w) for w in words
    )
    return f'"{joined}"'
