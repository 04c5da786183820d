# SPDX-License-Identifier: Apache-2.0
"""Persistent reservations of iSCSI LUNs: the verb, and what a second initiator sees of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.drivers.protocol.iscsi import Iscsi
from target.graph.graph import Graph
from target.peers.iscsi_target import IscsiTarget
from target.reservations import Conflict, Reservations, Type
from tests.support.daemon import Daemon, blockdev, blocktarget_argv, nbd_export, nbd_server_unix
from tests.support.iscsi import MIB, mock_options, nbd_clients
from tests.support.qcow2 import running_graph
from tests.support.tgtd import Tgtd, make_disk
from tests.support.tools import Completed, qemu_io, run

Start = Callable[..., Daemon]
SIZE = 8 * MIB


Server = Tgtd | IscsiTarget


@pytest.fixture(params=["tgtd", "mock"])
def server(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Server]:
    if request.param == "tgtd":
        with Tgtd(scratch) as tgtd:
            tgtd.add_target()
            tgtd.add_lun(make_disk(scratch / "lun", SIZE))
            yield tgtd
    else:
        with IscsiTarget() as mock:
            mock.add_disk(SIZE)
            yield mock


def options(server: Server) -> dict[str, Any]:
    return mock_options(server) if isinstance(server, IscsiTarget) else server.options()


def node(server: Server) -> list[str]:
    return blockdev(node_name="disk", **options(server))


def verb(server: Server, *words: str) -> Completed:
    return run(*blocktarget_argv("reservations", *node(server), *words), check=False)


def told(server: Server, *words: str) -> list[dict[str, Any]]:
    """What the actions of a call that succeeds report."""
    done = verb(server, *words, "--output", "json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    actions: list[dict[str, Any]] = json.loads(done.stdout)["actions"]
    return actions


# ---- the verb ----


def test_every_action(server: Server) -> None:
    assert told(server, "read-keys", "read-reservation")[1]["reservation"] is None
    *_, keys, reservation = told(
        server, "register,sa-key=0xa", "reserve,type=exclusive-access", "read-keys", "read-reservation"
    )
    assert keys["keys"] == ["0x000000000000000a"]
    assert reservation["reservation"] == {"key": "0x000000000000000a", "type": "exclusive-access"}
    # The next call is another initiator: it cannot take the reservation, but it can preempt it.
    done = verb(server, "register-ignore,sa-key=0xb", "reserve,type=exclusive-access")
    assert done.returncode == 2
    assert done.stderr == "blocktarget: node 'disk': reserve: reservation conflict\n"
    *_, reservation, keys, empty, gone = told(
        server,
        *("register-ignore,sa-key=0xc", "preempt,sa-key=0xa,type=write-exclusive", "read-reservation"),
        *("read-keys", "clear", "read-keys"),
    )[1:]
    assert reservation["reservation"] == {"key": "0x000000000000000c", "type": "write-exclusive"}
    assert "0x000000000000000a" not in keys["keys"]
    assert empty == {"action": "clear"} and gone["keys"] == []


def test_release_and_unregister_in_one_session(server: Server) -> None:
    kind = "write-exclusive-registrants-only"
    found = told(
        server,
        *("register,sa-key=1", f"reserve,type={kind}", "read-reservation", f"release,type={kind}"),
        *("read-reservation", "register,sa-key=0", "read-keys"),
    )
    assert found[2]["reservation"]["type"] == kind
    assert found[4]["reservation"] is None
    assert found[6]["keys"] == []


def test_a_key_that_is_not_registered_is_a_conflict(server: Server) -> None:
    for action in ("reserve,key=9,type=write-exclusive", "clear,key=9"):
        assert verb(server, action).returncode == 2
    assert verb(server, "register,key=9,sa-key=1").returncode == 2


def test_capabilities(server: Server) -> None:
    (found,) = told(server, "report-capabilities")
    assert "write-exclusive" in found["capabilities"]["types"]


def test_what_the_target_cannot_do_is_told(server: Server) -> None:
    done = verb(server, "register,sa-key=1", "--aptpl")
    assert done.returncode in (0, 3)
    if done.returncode == 3:
        assert "ILLEGAL REQUEST" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_target_that_is_not_there(scratch: Path) -> None:
    tgtd = Tgtd(scratch)
    done = run(*blocktarget_argv("reservations", *tgtd.node(), "read-keys"), check=False)
    assert done.returncode == 1
    assert "node 'disk'" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- a second initiator ----


async def initiator(graph: Graph, server: Server, name: str) -> Iscsi:
    made = await graph.add({"node-name": name, **options(server)})
    assert isinstance(made, Iscsi)
    return made


async def writes(node: Iscsi) -> bool:
    try:
        await node.write(0, b"\1" * 512)
    except OSError:
        return False
    return True


async def test_two_nodes_of_one_lun(server: Server) -> None:
    async with running_graph() as graph:
        first, second = [await initiator(graph, server, name) for name in ("first", "second")]
        one, two = Reservations(first), Reservations(second)
        await one.register(0, 1)
        await two.register(0, 2)
        assert sorted((await two.read_keys()).keys) == [1, 2]
        await one.reserve(1, Type.WRITE_EXCLUSIVE)
        assert await writes(first) and not await writes(second)
        assert await second.read(0, 512) == b"\1" * 512
        with pytest.raises(Conflict):
            await two.reserve(2, Type.WRITE_EXCLUSIVE)
        await two.preempt(2, 1, Type.EXCLUSIVE_ACCESS)
        found = await two.read_reservation()
        assert found is not None and (found.key, found.type) == (2, Type.EXCLUSIVE_ACCESS)
        assert await writes(second) and not await writes(first)
        with pytest.raises(OSError):
            await first.read(0, 512)
        # The first one has heard of it: by a unit attention, which its request passed.
        assert first.counters()["iscsi"]["unit_attentions"] + len(one.attentions) > 0
        await two.clear(2)
        assert await writes(first) and await writes(second)


async def test_all_types(server: Server) -> None:
    """What another initiator may do, registered and not."""
    async with running_graph() as graph:
        first, second = [await initiator(graph, server, name) for name in ("first", "second")]
        for kind in Type:
            for registered in (False, True):
                one, two = Reservations(first), Reservations(second)
                await one.register(0, 1)
                if registered:
                    await two.register(0, 2)
                await one.reserve(1, kind)
                shared = registered and kind not in (Type.WRITE_EXCLUSIVE, Type.EXCLUSIVE_ACCESS)
                assert await writes(first), kind
                assert await writes(second) == shared, (kind, registered)
                if kind.label.startswith("write-exclusive"):
                    assert len(await second.read(0, 512)) == 512
                await one.clear(1)


async def test_the_verb_against_a_running_target(server: Server, scratch: Path, start: Start) -> None:
    """A node fences the target's clients off, and lets them in again."""
    sock = scratch / "nbd.sock"
    start(*node(server), *nbd_server_unix(sock), *nbd_export())
    async with nbd_clients(sock) as (client,):
        await client.write(0, b"\1" * 512)
        assert told(server, "register,sa-key=1", "reserve,type=write-exclusive")
        with pytest.raises(OSError):
            await client.write(0, b"\2" * 512)
        assert await client.read(0, 512) == b"\1" * 512
        assert told(server, "register-ignore,sa-key=2", "clear")
        await client.write(0, b"\3" * 512)
        assert await client.read(0, 512) == b"\3" * 512


async def test_qemu_is_kept_out_and_we_by_nobody(server: Server) -> None:
    async with running_graph() as graph:
        ours = await initiator(graph, server, "ours")
        device = Reservations(ours)
        await device.register(0, 1)
        await device.reserve(1, Type.WRITE_EXCLUSIVE)
        refused = qemu_io(server.url(), "write -P 9 0 4k", check=False)
        assert "failed" in refused.stdout + refused.stderr or refused.returncode
        await ours.write(0, b"\1" * 4096)
        assert await ours.read(0, 4096) == b"\1" * 4096
        await device.release(1, Type.WRITE_EXCLUSIVE)
        qemu_io(server.url(), "write -P 9 0 4k")
        assert await ours.read(0, 4096) == b"\x09" * 4096


async def test_a_reservation_outlives_the_connection() -> None:
    """The session that comes back is the same nexus: its ISID is."""
    with IscsiTarget() as mock:
        mock.add_disk(SIZE)
        async with running_graph() as graph:
            first, second = [await initiator(graph, mock, name) for name in ("first", "second")]
            device = Reservations(first)
            await device.register(0, 1)
            await device.reserve(1, Type.EXCLUSIVE_ACCESS)
            for _ in range(3):
                mock.drop()
                assert await writes(first) and not await writes(second)
            await device.clear(1)
            assert await writes(second)


async def test_a_node_with_several_sessions() -> None:
    """Each is a nexus of its own: all are registered, or none."""
    with IscsiTarget() as mock:
        disk = mock.add_disk(SIZE)
        async with running_graph(threads=3) as graph:
            node = await graph.add({"node-name": "n", **mock_options(mock, sessions=3)})
            assert isinstance(node, Iscsi)
            device = Reservations(node)
            try:
                await device.register(0, 1)
            except OSError:
                assert not disk.reservations.keys
                return
            assert len(disk.reservations.keys) == 3
            await device.reserve(1, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY)
            for _ in range(30):
                assert await writes(node)
