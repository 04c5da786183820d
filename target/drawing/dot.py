# SPDX-License-Identifier: Apache-2.0
"""The picture in Graphviz's language."""

from __future__ import annotations

from target.drawing.picture import PALE, Box, Line, Picture, shorten

NAME_LENGTH = 80


def draw(picture: Picture) -> str:
    """A digraph; line labels hold the role, and what is needed / what others may do."""
    ids = {key: f"b{i}" for i, key in enumerate(picture.boxes)}
    lines = [
        "digraph blocktarget {",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
        '  edge [fontname="sans-serif", fontsize=10];',
        *(f"  {ids[box.key]} [{_box(box)}];" for box in picture.boxes.values()),
        *(f"  {ids[line.above]} -> {ids[line.below]} [{_line(line)}];" for line in picture.lines),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _box(box: Box) -> str:
    words = [f"{shorten(box.name, NAME_LENGTH)} ({box.what})", *box.rows]
    return f'label={_quoted(words)}, fillcolor="{PALE[box.kind]}"'


def _line(line: Line) -> str:
    style = ', style="dashed"' if line.reads_only else ""
    return f"label={_quoted(line.rows)}{style}"


def _quoted(words: list[str]) -> str:
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in words)
    return '"' + "\\n".join(escaped) + '"'
