# SPDX-License-Identifier: Apache-2.0
"""An iscsi node against a target in this process: commands of the user's, and a build without libiscsi."""

from __future__ import annotations

import errno

import pytest

from target.drivers.protocol.iscsi import node as module
from target.graph.errors import BlockError
from target.peers.iscsi_target.server import IscsiTarget
from tests.support.iscsi import mock_options
from tests.support.qcow2 import running_graph

TEST_UNIT_READY = bytes(6)
INQUIRY = bytes((0x12, 0, 0, 0, 36, 0))
PERSISTENT_RESERVE_OUT = bytes((0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0))
NO_SUCH_COMMAND = bytes((0xC0, *bytes(9)))


async def test_a_build_without_libiscsi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AVAILABLE", False)
    async with running_graph() as graph:
        with pytest.raises(BlockError, match="node 'disk': driver 'iscsi': this build lacks libiscsi"):
            await graph.add(
                {
                    "node-name": "disk",
                    "driver": "iscsi",
                    "transport": "tcp",
                    "portal": "127.0.0.1:1",
                    "target": "iqn.2026-11.org.example:disk",
                }
            )


async def test_commands() -> None:
    with IscsiTarget() as mock:
        mock.add_disk(1 << 20)
        async with running_graph() as graph:
            node = await graph.add({"node-name": "disk", **mock_options(mock)})
            assert isinstance(node, module.Iscsi)
            assert await node.scsi_command(TEST_UNIT_READY) == (0, b"", b"")
            status, sense, data = await node.scsi_command(INQUIRY, None, 36)
            assert (status, sense, len(data), data[0]) == (0, b"", 36, 0)
            status, sense, data = await node.scsi_command(NO_SUCH_COMMAND)
            assert (status, sense[2] & 15, sense[12], data) == (2, 5, 0x20, b"")
            with pytest.raises(ValueError):
                await node.scsi_command(INQUIRY, b"out", 36)


async def test_reservations_are_of_one_session() -> None:
    with IscsiTarget() as mock:
        mock.add_disk(1 << 20)
        async with running_graph() as graph:
            node = await graph.add({"node-name": "disk", **mock_options(mock, sessions=2)})
            assert isinstance(node, module.Iscsi)
            with pytest.raises(OSError, match=r"node 'disk': .*sessions=1") as caught:
                await node.scsi_command(PERSISTENT_RESERVE_OUT, bytes(24))
            assert caught.value.errno == errno.EOPNOTSUPP
