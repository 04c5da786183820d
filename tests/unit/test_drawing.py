# SPDX-License-Identifier: Apache-2.0
"""Drawings of a graph: what is seen through QMP, places in good order, and text that is safe in each form."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from target.drawing import dot, mermaid, svg, text
from target.drawing.layout import BOX_GAP, Layout, place
from target.drawing.observe import observe
from target.drawing.picture import Box, Kind, Line, Picture, Traffic, count, shorten, size

Json = dict[str, Any]
SVG = "{http://www.w3.org/2000/svg}"


class FakeServer:
    """Answers as a target does; each look at the counters finds 1000 more reads of 4 KiB."""

    def __init__(self, nodes: dict[str, list[str]], exports: list[Json]) -> None:
        self.nodes = nodes  # children by name
        self.exports = exports
        self.looks = 0

    def execute(self, name: str, arguments: Json | None = None) -> Any:
        answers = {
            "query-blockstats": self.blockstats,
            "query-block-exports": lambda: self.exports,
            "query-named-block-nodes": lambda: [self.info(node) for node in self.nodes],
            "x-debug-query-block-graph": self.graph,
        }
        return answers[name]()

    def blockstats(self) -> list[Json]:
        self.looks += 1
        stats = {
            "rd_operations": 1000 * self.looks,
            "rd_bytes": 4096000 * self.looks,
            "wr_operations": 0,
            "wr_bytes": 0,
        }
        return [{"node-name": name, "stats": stats} for name in self.nodes]

    def info(self, name: str) -> Json:
        driver = "qcow2" if self.nodes[name] else "file"
        image = {"virtual-size": 20 << 30, "actual-size": 3 << 20}
        return {"node-name": name, "drv": driver, "ro": False, "file": f"/images/{name}", "image": image}

    def graph(self) -> Json:
        ids = {name: i for i, name in enumerate(self.nodes)}
        nodes = [{"id": i, "type": "block-driver", "name": name} for name, i in ids.items()]
        edges = []
        for name, below in self.nodes.items():
            for i, child in enumerate(below):
                edges.append(edge(ids[name], ids[child], ["file", "backing"][i], ["consistent-read"]))
        for i, export in enumerate(self.exports):
            nodes.append({"id": 100 + i, "type": "block-backend", "name": ""})
            edges.append(edge(100 + i, ids[export["node-name"]], "root", ["consistent-read", "write"]))
        nodes.append({"id": 999, "type": "block-job", "name": "job0"})
        edges.append(edge(999, 0, "main node", []))
        return {"nodes": nodes, "edges": edges}


def edge(parent: int, child: int, role: str, perm: list[str]) -> Json:
    return {"parent": parent, "child": child, "name": role, "perm": perm, "shared-perm": ["consistent-read"]}


def server(clients: int = 1) -> FakeServer:
    client = {"peer": "unix", "pid": 7, "since": 0.0, "requests": 5, "failed": 1}
    export = {
        "id": "e",
        "type": "nbd",
        "node-name": "disk",
        "shutting-down": False,
        "x-writable": True,
        "x-clients": [client] * clients,
    }
    return FakeServer(
        {"disk": ["disk.file", "base"], "disk.file": [], "base": ["base.file"], "base.file": []}, [export]
    )


# ---- what is seen ----


def test_what_is_seen() -> None:
    picture = observe(server(), 0.05)
    disk = picture.boxes["node disk"]
    assert (disk.kind, disk.name, disk.what, disk.notes) == (Kind.FORMAT, "disk", "qcow2", ["20 GiB"])
    assert disk.traffic is not None and 1000 < disk.traffic.reads < 1000 / 0.05 + 1
    leaf = picture.boxes["node base.file"]
    assert (leaf.kind, leaf.notes) == (Kind.STORAGE, ["20 GiB, 3 MiB allocated", "/images/base.file"])
    export = picture.boxes["export e"]
    assert (export.kind, export.what, export.notes) == (Kind.EXPORT, "nbd", ["writable"])
    [client] = [box for box in picture.boxes.values() if box.kind is Kind.CLIENT]
    assert client.notes == ["process 7", "5 requests, 1 failed"]
    [job] = [box for box in picture.boxes.values() if box.kind is Kind.USER]
    assert (job.name, job.what) == ("job0", "block-job")
    lines = {(line.above, line.below, line.role, line.terms) for line in picture.lines}
    assert ("export e", "node disk", "", "rw-- / r---") in lines
    assert ("node disk", "node base", "backing", "r--- / r---") in lines
    assert (job.key, "node disk", "main node", "---- / r---") in lines
    assert (client.key, "export e", "", "") in lines
    assert len(lines) == 6


def test_without_an_interval_there_are_no_figures() -> None:
    fake = server()
    picture = observe(fake, 0)
    assert fake.looks == 1
    assert picture.seconds == 0
    assert all(box.traffic is None for box in picture.boxes.values())


def test_a_crowd_of_clients_is_summed_up() -> None:
    picture = observe(server(clients=90), 0)
    clients = [box.name for box in picture.boxes.values() if box.kind is Kind.CLIENT]
    assert clients == ["unix"] * 4 + ["86 more"]


def test_qemu_tells_less() -> None:
    fake = server()
    for member in ("x-writable", "x-clients"):
        del fake.exports[0][member]
    picture = observe(fake, 0)
    assert picture.boxes["export e"].notes == ["writable"]


def test_an_export_whose_user_is_gone() -> None:
    """The graph may change between two questions."""
    fake = server()
    graph = fake.graph()
    graph["edges"] = [edge for edge in graph["edges"] if edge["parent"] != 100]
    fake.graph = lambda: graph  # type: ignore[method-assign]
    fake.exports.append(fake.exports[0] | {"id": "f", "node-name": "nowhere"})
    picture = observe(fake, 0)
    assert {(line.above, line.below) for line in picture.lines if line.above.startswith("export")} == {
        ("export e", "node disk")
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (20 << 30, "20 GiB"), (123 << 50, "123 PiB")],
)
def test_sizes(value: int, words: str) -> None:
    assert size(value) == words


def test_counts_and_long_names() -> None:
    assert [count(n) for n in (7, 999, 12345, 2.5, 5e9)] == ["7", "999", "12.3k", "2.5", "5G"]
    assert shorten("/a/very/long/path/to/an/image.qcow2", 20) == "/a/very…/image.qcow2"
    assert len(shorten("x" * 1000, 34)) == 34
    assert "\x1b" not in shorten("\x1b[2J", 34)


# ---- places ----


def random_graph(seed: int) -> tuple[dict[str, tuple[float, float]], list[tuple[str, str]]]:
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(rng.randrange(1, 40))]
    sizes = {name: (rng.uniform(80, 300), rng.uniform(30, 100)) for name in names}
    pairs = list(itertools.combinations(names, 2))
    return sizes, rng.sample(pairs, min(len(pairs), rng.randrange(0, 50)))


def check(layout: Layout, sizes: dict[str, tuple[float, float]], lines: list[tuple[str, str]]) -> None:
    for a, b in itertools.combinations(layout.boxes.values(), 2):
        apart = abs(a.x - b.x) - (a.width + b.width) / 2
        assert apart > BOX_GAP - 1 or a.y + a.height < b.y or b.y + b.height < a.y, (a, b)
    for (above, below), route in zip(lines, layout.routes, strict=True):
        upper, lower = layout.boxes[above], layout.boxes[below]
        assert upper.y + upper.height < lower.y
        assert route[0][1] == upper.y + upper.height and route[-1][1] == lower.y
        assert abs(route[0][0] - upper.x) <= upper.width / 2
        assert abs(route[-1][0] - lower.x) <= lower.width / 2
        assert [y for _, y in route] == sorted(y for _, y in route)
    for box in layout.boxes.values():
        assert box.x - box.width / 2 > -0.01 and box.x + box.width / 2 < layout.width + 0.01
        assert box.y >= 0 and box.y + box.height < layout.height + 0.01
    assert set(layout.boxes) == set(sizes)


@pytest.mark.parametrize("seed", range(30))
def test_boxes_do_not_overlap_and_stand_below_their_users(seed: int) -> None:
    sizes, lines = random_graph(seed)
    check(place(sizes, lines), sizes, lines)


def test_a_long_chain_and_a_wide_node() -> None:
    sizes = {f"n{i}": (150.0, 60.0) for i in range(400)}
    chain = [(f"n{i}", f"n{i + 1}") for i in range(199)]
    lines = chain + [("n199", f"n{i}") for i in range(200, 300)]
    check(place(sizes, lines), sizes, lines)


def test_lines_do_not_cross_where_they_need_not() -> None:
    """Two trees, given in an order that mixes them."""
    sizes = dict.fromkeys(("a", "b", "b1", "a1", "b2", "a2"), (100.0, 40.0))
    lines = [("a", "a2"), ("b", "b1"), ("a", "a1"), ("b", "b2")]
    layout = place(sizes, lines)
    xs = {name: box.x for name, box in layout.boxes.items()}
    assert max(xs["a1"], xs["a2"]) < min(xs["b1"], xs["b2"])
    assert abs(xs["a"] - (xs["a1"] + xs["a2"]) / 2) < 1
    assert not place({}, []).boxes


# ---- forms ----

HOSTILE = '<b>"&]]>\x1b[31m\x00\\n|{};--%% \N{RIGHT-TO-LEFT OVERRIDE}'


@pytest.fixture
def picture() -> Picture:
    boxes = [
        Box("e", Kind.EXPORT, "e", "nbd", ["writable"], traffic=Traffic(10, 40960, 3, 12e6)),
        Box("f", Kind.EXPORT, "f", "nbd", ["read-only"]),
        Box("n", Kind.FORMAT, "disk", "qcow2", ["20 GiB"], traffic=Traffic(10, 40960)),
        Box("m", Kind.STORAGE, shorten(HOSTILE, 60), "file", ["512 B", shorten(HOSTILE, 60)], HOSTILE),
    ]
    read, write = frozenset(["consistent-read"]), frozenset(["write"])
    lines = [
        Line("e", "n", "", read | write, read),
        Line("f", "n", "", read, read | write),
        Line("n", "m", "file", read, read),
    ]
    return Picture({box.key: box for box in boxes}, lines, 1.0)


def test_svg(picture: Picture) -> None:
    root = ElementTree.fromstring(svg.draw(picture))
    words = [element.text for element in root.iter(f"{SVG}text")]
    for expected in ("disk", "20 GiB", "read 40 KiB/s, 10/s", "file", "r--- / r---", "write 11.4 MiB/s, 3/s"):
        assert expected in words
    assert len(list(root.iter(f"{SVG}title"))) == 1 + len(picture.boxes)
    widths = [float(element.get("stroke-width", 0)) for element in root.iter(f"{SVG}path")]
    assert max(widths) > 2  # where there is traffic
    assert sum(e.get("stroke-dasharray") is not None for e in root.iter(f"{SVG}path")) == 2
    ElementTree.fromstring(svg.draw(Picture({}, [])))


def test_text(picture: Picture) -> None:
    drawn = text.draw(picture)
    lines = drawn.splitlines()
    assert lines[0].split() == [
        "e",
        "nbd",
        "writable",
        "read",
        "40",
        "KiB/s,",
        "10/s;",
        "write",
        "11.4",
        "MiB/s,",
        "3/s",
    ]
    assert re.match(r"└─ disk +qcow2 +rw-- / r--- +20 GiB +read 40 KiB/s, 10/s$", lines[1])
    assert lines[2].startswith("   └─ file: <b>")
    assert "(see above)" in lines[4]
    assert all(char.isprintable() or char == "\n" for char in drawn)
    assert "\x1b[1;34mdisk\x1b[0m" in text.draw(picture, colour=True)
    assert "no nodes" in text.draw(Picture({}, []))


def test_dot_and_mermaid_quote_what_has_a_meaning(picture: Picture) -> None:
    for line in dot.draw(picture).splitlines():
        bare = re.sub(r'"(\\.|[^"\\])*"', "", line)
        assert '"' not in bare and "|" not in bare
    drawn = mermaid.draw(picture)
    assert "<b>" not in drawn
    for line in drawn.splitlines():
        assert line.count('"') in (0, 2)
    assert '-.->|"file<br/>r--- / r---"|' in drawn
