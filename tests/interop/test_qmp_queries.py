# SPDX-License-Identifier: Apache-2.0
"""Queries about nodes, traffic and exports, and the events of single nodes, over a real monitor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import nbd_uri
from tests.support.qmp import Qmp, QmpError, qmp_daemon
from tests.support.qmp_pair import Json, Pair
from tests.support.tools import create_image, qemu_img, qemu_io

MIB = 1 << 20


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    create_image(directory / "r", "4M", format="raw")
    create_image(directory / "base", "4M")
    create_image(directory / "top", "4M", backing=Path("base"))
    qemu_img("snapshot", "-c", "before", directory / "top")
    create_image(directory / "old", "4M", options="compat=0.10,cluster_size=4096")
    return directory


@pytest.fixture
def pair(images: Path) -> Iterator[Pair]:
    both = Pair(images)
    yield both
    both.stop()


@pytest.fixture
def monitor(tmp_path: Path, images: Path) -> Iterator[Qmp]:
    with qmp_daemon(tmp_path / "qmp"), Qmp(tmp_path / "qmp") as client:
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        client.execute("nbd-server-start", addr=address)
        yield client


def add(client: Qmp, **options: Any) -> None:
    client.execute("blockdev-add", **options)


NODES: list[Json] = [
    {"driver": "file", "node-name": "f", "filename": "r", "discard": "unmap"},
    {"driver": "raw", "node-name": "window", "file": "f", "offset": MIB, "size": MIB, "read-only": True},
    {"driver": "raw", "node-name": "whole", "file": "f", "detect-zeroes": "on"},
    {"driver": "raw", "node-name": "twice", "file": "whole"},
    {"driver": "null-co", "node-name": "n", "size": MIB},
    {"driver": "null-co", "node-name": "plain"},
    {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "top"}},
    {
        "driver": "qcow2",
        "node-name": "o",
        "file": {"driver": "file", "filename": "old"},
        "cache": {"direct": True},
    },
]
NEWER = {"active", "children"}  # members that the peer's version does not have


def test_nodes_are_described_as_by_the_peer(pair: Pair) -> None:
    for options in NODES:
        peer, ours = pair.run("blockdev-add", options)
        assert peer.error is None and ours.error is None, ours
    for flat in (False, True):
        peer, ours = pair.run("query-named-block-nodes", {"flat": flat})
        theirs = {node["node-name"]: comparable(node) for node in peer.value}
        for node in ours.value:
            if not node["node-name"].startswith("#"):
                assert comparable(node) == theirs.pop(node["node-name"])
        assert all(name.startswith("#") for name in theirs)


def comparable(value: Any) -> Any:
    """Without what is newer, or each one's affair: sizes on disk, the order of members in json: names."""
    if isinstance(value, dict):
        if value.get("format-specific", {}).get("type") == "file":
            value = {key: item for key, item in value.items() if key != "format-specific"}
        return {key: comparable(item) for key, item in value.items() if key not in {*NEWER, "actual-size"}}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return sorted(value) if isinstance(value, str) and value.startswith("json:") else value


def test_traffic_of_an_export_and_of_the_nodes_below(monitor: Qmp, images: Path, tmp_path: Path) -> None:
    file = {"driver": "file", "node-name": "f", "filename": str(images / "r"), "discard": "unmap"}
    add(monitor, driver="raw", node_name="disk", file=file, discard="unmap")
    monitor.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    qemu_io(
        nbd_uri(tmp_path / "nbd"), "write 64k 64k", "read 0 4k", "discard 1M 64k", "write -z 2M 4k", "flush"
    )
    stats = {node["node-name"]: node for node in monitor.execute("query-blockstats", query_nodes=True)}
    for name in ("disk", "f"):
        found = stats[name]["stats"]
        assert (found["rd_bytes"], found["rd_operations"]) == (4096, 1)
        assert (found["wr_bytes"], found["wr_operations"]) == (65536 + 4096, 2)
        assert (found["unmap_bytes"], found["unmap_operations"]) == (65536, 1)
        assert found["wr_highest_offset"] == 128 << 10 and found["flush_operations"] >= 1
        assert not any(found[f"failed_{kind}_operations"] for kind in ("rd", "wr", "flush", "unmap"))
    specific = stats["f"]["driver-specific"]
    assert specific == {
        "driver": "file",
        "discard-nb-ok": 1,
        "discard-nb-failed": 0,
        "discard-bytes-ok": 65536,
    }
    assert stats["disk"]["parent"] == stats["f"]
    assert monitor.execute("query-blockstats") == [] and monitor.execute("query-block") == []
    (export,) = monitor.execute("query-block-exports")
    assert export["x-stats"]["wr_operations"] == 2 and export["x-writable"]
    monitor.execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk", "file": "f"}])
    after = {node["node-name"]: node for node in monitor.execute("query-blockstats", query_nodes=True)}
    assert after["f"]["stats"]["wr_bytes"] == 65536 + 4096


def test_a_write_past_a_threshold_is_told_once(monitor: Qmp, images: Path, tmp_path: Path) -> None:
    add(monitor, driver="file", node_name="f", filename=str(images / "r"))
    add(monitor, driver="raw", node_name="disk", file="f")
    monitor.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    monitor.execute("block-set-write-threshold", node_name="f", write_threshold=MIB)
    assert threshold(monitor, "f") == MIB
    uri = nbd_uri(tmp_path / "nbd")
    qemu_io(uri, "write 0 1M")
    assert threshold(monitor, "f") == MIB
    qemu_io(uri, "write 1020k 12k", "write 2M 4k")
    event = monitor.wait_event("BLOCK_WRITE_THRESHOLD")
    assert event["data"] == {"node-name": "f", "amount-exceeded": 8192, "write-threshold": MIB}
    assert threshold(monitor, "f") == 0
    assert not [found for found in monitor.events if found["event"] == "BLOCK_WRITE_THRESHOLD"]


def threshold(client: Qmp, name: str) -> int:
    nodes = client.execute("query-named-block-nodes", flat=True)
    (found,) = (node["write_threshold"] for node in nodes if node["node-name"] == name)
    return int(found)


def test_a_corrupt_image_is_told_of(monitor: Qmp, images: Path, tmp_path: Path) -> None:
    path = images / "base"
    qemu_io(path, "write 0 64k", format="qcow2")
    with path.open("r+b") as image:  # the first entry of the L1 table: not aligned to a cluster
        image.seek(40)
        l1 = int.from_bytes(image.read(8), "big")
        image.seek(l1)
        table = int.from_bytes(image.read(8), "big") & 0x00FF_FFFF_FFFF_FE00
        image.seek(table)
        image.write((1 << 63 | 0x50200).to_bytes(8, "big"))
    file = {"driver": "file", "filename": str(path)}
    add(monitor, driver="qcow2", node_name="disk", file=file)
    monitor.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    qemu_io(nbd_uri(tmp_path / "nbd"), "read 0 4k", check=False)
    event = monitor.wait_event("BLOCK_IMAGE_CORRUPTED")
    data = event["data"]
    assert data["device"] == "" and data["node-name"] == "disk" and data["fatal"] is True and data["msg"]
    (node,) = (n for n in monitor.execute("query-named-block-nodes") if n["node-name"] == "disk")
    assert node["image"]["format-specific"]["data"]["corrupt"] is True


def test_a_node_with_a_writer_is_not_made_read_only(monitor: Qmp, images: Path) -> None:
    file = {"driver": "file", "filename": str(images / "r")}
    add(monitor, driver="raw", node_name="disk", file=file)
    monitor.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    options = {"driver": "raw", "node-name": "disk", "file": file, "read-only": True}
    with pytest.raises(QmpError, match="block export 'e'") as refused:
        monitor.execute("blockdev-reopen", options=[options])
    assert refused.value.kind == "GenericError"
    (node,) = (n for n in monitor.execute("query-named-block-nodes") if n["node-name"] == "disk")
    assert node["ro"] is False


def test_edges_are_shown_with_their_permissions(monitor: Qmp, images: Path) -> None:
    add(monitor, driver="null-co", node_name="n")
    monitor.execute("block-export-add", type="nbd", id="e", node_name="n")
    graph = monitor.execute("x-debug-query-block-graph")
    node, backend = graph["nodes"]
    assert (node["type"], node["name"]) == ("block-driver", "n")
    assert (backend["type"], backend["name"]) == ("block-backend", "")
    (edge,) = graph["edges"]
    assert (edge["parent"], edge["child"], edge["name"]) == (backend["id"], node["id"], "root")
    assert edge["perm"] == ["consistent-read"]
