# SPDX-License-Identifier: Apache-2.0
"""The file of a snapshot is one that a node uses: it would be its own backing file, and the data gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.daemon import blockdev
from tests.support.qmp import Qmp, QmpError, qmp_daemon
from tests.support.tools import create_image, qemu_io


def test_a_snapshot_onto_an_image_in_use_without_locks(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    file = {"driver": "file", "filename": str(image), "locking": "off"}
    snapshot = {"node_name": "disk", "snapshot_file": str(image), "snapshot_node_name": "snap"}
    refused = pytest.raises(QmpError, match="node 'disk' child 'file' uses the file")
    argv = blockdev(driver="qcow2", node_name="disk", file=file)
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client, refused:
        client.execute("blockdev-snapshot-sync", **snapshot)


def test_a_snapshot_of_a_read_only_node_is_read_only(scratch: Path) -> None:
    image = create_image(scratch / "disk", "1M", format="raw")
    argv = blockdev(driver="file", node_name="disk", filename=str(image), read_only=True)
    snapshot = {"node_name": "disk", "snapshot_file": str(scratch / "s"), "snapshot_node_name": "snap"}
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client:
        client.execute("blockdev-snapshot-sync", **snapshot)
        nodes = client.execute("query-named-block-nodes", flat=True)
        assert all(node["ro"] for node in nodes) and len(nodes) == 3


def test_a_snapshot_of_a_node_that_copies_on_read(scratch: Path) -> None:
    """It was refused, as the node's file cannot become read-only; it stays as it is, as QEMU leaves it."""
    file = {"driver": "file", "filename": str(create_image(scratch / "disk", "1M", format="raw"))}
    snapshot = {"node_name": "disk", "snapshot_file": str(scratch / "s"), "snapshot_node_name": "snap"}
    argv = blockdev(driver="copy-on-read", node_name="disk", file=file)
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client:
        client.execute("blockdev-snapshot-sync", **snapshot)
        nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes", flat=True)}
        assert [child["node-name"] for child in nodes["snap"]["children"] if child["child"] == "backing"] == [
            "disk"
        ]


def test_a_filter_is_no_overlay(scratch: Path) -> None:
    argv = [
        *blockdev(driver="null-co", node_name="disk"),
        *blockdev(driver="null-co", node_name="other"),
        *blockdev(driver="copy-on-read", node_name="filter", file="other"),
    ]
    refused = pytest.raises(QmpError, match="Filters cannot be used as overlays")
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client, refused:
        client.execute("blockdev-snapshot", node="disk", overlay="filter")


def test_the_name_of_an_overlay_whose_backing_has_no_file(scratch: Path) -> None:
    """It was shown as options, as if another node were behind it than the image says."""
    snapshot = {"node_name": "disk", "snapshot_file": str(scratch / "s"), "snapshot_node_name": "snap"}
    argv = blockdev(driver="null-co", node_name="disk")
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client:
        client.execute("blockdev-snapshot-sync", **snapshot)
        nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes", flat=True)}
        assert nodes["snap"]["file"] == str(scratch / "s")
        assert nodes["snap"]["image"]["full-backing-filename"] == "null-co://"


@pytest.mark.parametrize("name", ["disk.qcow2", "hard.qcow2", "other.qcow2"])
def test_a_snapshot_onto_an_image_in_use(scratch: Path, name: str) -> None:
    for made in ("disk.qcow2", "other.qcow2"):
        create_image(scratch / made, "1M")
        qemu_io(scratch / made, "write -P 7 0 1M", format="qcow2")
    os.link(scratch / "disk.qcow2", scratch / "hard.qcow2")
    argv = [
        *blockdev(
            driver="qcow2", node_name="disk", file={"driver": "file", "filename": str(scratch / "disk.qcow2")}
        ),
        *blockdev(
            driver="qcow2",
            node_name="other",
            file={"driver": "file", "filename": str(scratch / "other.qcow2")},
        ),
    ]
    before = (scratch / name).stat().st_ino
    snapshot = {"node_name": "disk", "snapshot_file": str(scratch / name), "snapshot_node_name": "snap"}
    refused = pytest.raises(QmpError, match=f'Failed to get "write" lock: .*{name}')
    with qmp_daemon(scratch / "qmp", *argv), Qmp(scratch / "qmp") as client, refused:
        client.execute("blockdev-snapshot-sync", **snapshot)
    assert (scratch / name).stat().st_ino == before
    qemu_io(scratch / "disk.qcow2", "read -P 7 0 1M", format="qcow2")
