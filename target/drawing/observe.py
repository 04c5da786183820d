# SPDX-License-Identifier: Apache-2.0
"""Looks at a running target through QMP. qemu-storage-daemon is understood, too; it tells less."""

from __future__ import annotations

import time
from typing import Any, Protocol

from target.drawing.picture import Box, Kind, Line, Picture, Traffic, shorten, size

Json = dict[str, Any]

FILTERS = frozenset(
    [
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "preallocate",
        "quorum",
        "snapshot-access",
        "throttle",
    ]
)
CLIENTS_SHOWN = 4  # of one export
FILENAME_LENGTH = 34
NAME_LENGTH = 64
COUNTED = ("rd_operations", "rd_bytes", "wr_operations", "wr_bytes")


class Server(Protocol):
    """A QMP connection."""

    def execute(self, name: str, arguments: Json | None = None) -> Any: ...


def observe(server: Server, seconds: float = 1.0) -> Picture:
    """The graph as it is now, and the traffic of the time before."""
    before = Sample(server) if seconds else None
    time.sleep(seconds)
    return _Observation(server, Sample(server), before).picture()


class Sample:
    """Counters at one time, by node and by export."""

    def __init__(self, server: Server) -> None:
        self.at = time.monotonic()
        stats: list[Json] = server.execute("query-blockstats", {"query-nodes": True})
        self.nodes: dict[str, Json] = {found["node-name"]: found["stats"] for found in stats}
        self.exports: list[Json] = server.execute("query-block-exports")

    def export_stats(self) -> dict[str, Json]:
        return {export["id"]: export["x-stats"] for export in self.exports if "x-stats" in export}


def rates(before: Json, after: Json, seconds: float) -> Traffic:
    """A counter that went back (the node is another one) starts from 0."""
    differences = [after[name] - before[name] for name in COUNTED]
    numbers = [after[n] if d < 0 else d for n, d in zip(COUNTED, differences, strict=True)]
    return Traffic(*(number / seconds for number in numbers))


class _Observation:
    """The answers, and the picture that comes of them."""

    def __init__(self, server: Server, now: Sample, before: Sample | None) -> None:
        self.graph: Json = server.execute("x-debug-query-block-graph")
        self.infos: dict[str, Json] = {
            info["node-name"]: info for info in server.execute("query-named-block-nodes", {"flat": True})
        }
        self.now = now
        self.before = before
        self.boxes: dict[str, Box] = {}
        self.lines: list[Line] = []
        self.names = {n["id"]: n["name"] for n in self.graph["nodes"] if n["type"] == "block-driver"}
        self.users = {n["id"]: n for n in self.graph["nodes"] if n["type"] != "block-driver"}
        self.inner: set[str] = set()  # nodes with children
        self.edges: list[Json] = []  # of users outside the graph

    def picture(self) -> Picture:
        self._sort_edges()
        for export in self.now.exports:
            self._add_export(export)
        for edge in self.edges:
            self._add_user(edge)
        for name in self.names.values():
            self.boxes[f"node {name}"] = self._node(name)
        lines = [line for line in self.lines if line.below in self.boxes]
        seconds = self.now.at - self.before.at if self.before else 0.0
        return Picture(self.boxes, lines, seconds)

    def _traffic(self, before: dict[str, Json], now: dict[str, Json], key: str) -> Traffic | None:
        if self.before is None or key not in before or key not in now:
            return None
        return rates(before[key], now[key], self.now.at - self.before.at)

    # ---- nodes and edges ----

    def _sort_edges(self) -> None:
        for edge in self.graph["edges"]:
            if edge["child"] not in self.names:
                continue
            if edge["parent"] in self.names:
                above = self.names[edge["parent"]]
                self.inner.add(above)
                self.lines.append(self._line(f"node {above}", edge, edge["name"]))
            else:
                self.edges.append(edge)

    def _line(self, above: str, edge: Json, role: str) -> Line:
        perm, shared = frozenset(edge["perm"]), frozenset(edge["shared-perm"])
        return Line(above, f"node {self.names[edge['child']]}", _safe(role), perm, shared)

    def _node(self, name: str) -> Box:
        info = self.infos.get(name, {})
        driver = info.get("drv", "")
        kind = Kind.STORAGE if name not in self.inner else Kind.FILTER if driver in FILTERS else Kind.FORMAT
        image = info.get("image", {})
        notes = [_sizes(image, kind)] if "virtual-size" in image else []
        if kind is Kind.STORAGE and info.get("file"):
            notes.append(shorten(info["file"], FILENAME_LENGTH))
        flags = _flags(info)
        if flags:
            notes.append(", ".join(flags))
        traffic = self._traffic(self.before.nodes if self.before else {}, self.now.nodes, name)
        return Box(f"node {name}", kind, _safe(name), _safe(driver), notes, info.get("file", ""), traffic)

    # ---- users outside the graph ----

    def _add_export(self, export: Json) -> None:
        key, node = f"export {export['id']}", export["node-name"]
        edge = self._edge_of(export)
        writable = export.get("x-writable", edge is None or "write" in edge["perm"])
        notes = ["writable" if writable else "read-only"]
        if export.get("shutting-down"):
            notes.append("shutting down")
        stats = self.before.export_stats() if self.before else {}
        traffic = self._traffic(stats, self.now.export_stats(), export["id"])
        self._add_clients(key, export.get("x-clients", []))
        self.boxes[key] = Box(
            key, Kind.EXPORT, _safe(export["id"]), _safe(export["type"]), notes, traffic=traffic
        )
        if edge is None:
            self.lines.append(Line(key, f"node {node}"))
        else:
            self.edges.remove(edge)
            self.lines.append(self._line(key, edge, ""))

    def _edge_of(self, export: Json) -> Json | None:
        """The graph does not say which user an export is: one of its node, rather one that may do as much."""
        node = export["node-name"]
        edges = [edge for edge in self.edges if self.names[edge["child"]] == node]
        writable = export.get("x-writable")
        alike = [edge for edge in edges if writable is None or ("write" in edge["perm"]) == writable]
        return next(iter(alike or edges), None)

    def _add_clients(self, export: str, clients: list[Json]) -> None:
        for i, client in enumerate(clients[:CLIENTS_SHOWN]):
            key = f"client {i} of {export}"
            name = shorten(client["peer"], FILENAME_LENGTH)
            told = "pid" not in client or str(client["pid"]) in name
            notes = [] if told else [f"process {client['pid']}"]
            notes.append(f"{client['requests']} requests")
            if client["failed"]:
                notes[-1] += f", {client['failed']} failed"
            self.boxes[key] = Box(key, Kind.CLIENT, name, "client", notes, client["peer"])
            self.lines.append(Line(key, export))
        more = len(clients) - CLIENTS_SHOWN
        if more > 0:
            key = f"clients of {export}"
            self.boxes[key] = Box(key, Kind.CLIENT, f"{more} more", "clients")
            self.lines.append(Line(key, export))

    def _add_user(self, edge: Json) -> None:
        """A job, a device, or whatever else it is."""
        user = self.users[edge["parent"]]
        key = f"user {edge['parent']}"
        if key not in self.boxes:
            self.boxes[key] = Box(key, Kind.USER, _safe(user["name"]) or "(no name)", _safe(user["type"]))
        self.lines.append(self._line(key, edge, edge["name"]))


def _safe(name: str) -> str:
    return shorten(name, NAME_LENGTH)


def _sizes(image: Json, kind: Kind) -> str:
    text = size(image["virtual-size"])
    if kind is Kind.STORAGE and "actual-size" in image:
        text += f", {size(image['actual-size'])} allocated"
    return text


def _flags(info: Json) -> list[str]:
    flags = ["read-only"] if info.get("ro") else []
    flags += [] if info.get("active", True) else ["inactive"]
    flags += ["encrypted"] if info.get("encrypted") else []
    flags += ["direct"] if info.get("cache", {}).get("direct") else []
    return flags
