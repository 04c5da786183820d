# SPDX-License-Identifier: Apache-2.0
"""The iscsi driver against tgtd and the mock: login, content as QEMU's driver sees it, sizes, copies."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.exports.vhost_user_blk import messages
from target.peers.iscsi_target import Features, IscsiTarget, Limits, faults
from target.peers.vhost_user_front_end import FrontEnd
from tests.support.daemon import (
    Daemon,
    nbd_export,
    nbd_server_unix,
    nbd_uri,
    vhost_user_export,
)
from tests.support.iscsi import MIB, Operations, daemon, fails, mock_node, mock_options, nbd_clients
from tests.support.nbd_model import Model
from tests.support.qcow2 import running_graph
from tests.support.tgtd import Account, Tgtd, make_disk
from tests.support.tools import fill, image_map, qemu_img, qemu_io, run

Start = Callable[..., Daemon]
SIZE = 32 * MIB
USER, TARGET_SIDE = Account("alice", "a-password-123"), Account("target", "another-secret")


@pytest.fixture
def tgtd(scratch: Path) -> Iterator[Tgtd]:
    with Tgtd(scratch) as target:
        yield target


@pytest.fixture
def mock() -> Iterator[IscsiTarget]:
    with IscsiTarget() as target:
        yield target


def lun(tgtd: Tgtd, scratch: Path, **options: Any) -> Path:
    """A disk of the only target."""
    tgtd.add_target()
    return tgtd.add_lun(make_disk(scratch / "lun", SIZE), **options)


# ---- login ----


def secrets(**passwords: str) -> list[str]:
    return [word for id, data in passwords.items() for word in ("--object", f"secret,id={id},data={data}")]


CHAP = {"user": USER.user, "password_secret": "pw"}
MUTUAL = {**CHAP, "mutual_user": TARGET_SIDE.user, "mutual_password_secret": "back"}


@pytest.mark.parametrize(
    ("outgoing", "options", "passwords"),
    [
        (None, CHAP, {"pw": USER.password}),
        (TARGET_SIDE, CHAP, {"pw": USER.password}),
        (TARGET_SIDE, MUTUAL, {"pw": USER.password, "back": TARGET_SIDE.password}),
    ],
)
def test_chap(
    tgtd: Tgtd,
    scratch: Path,
    outgoing: Account | None,
    options: dict[str, str],
    passwords: dict[str, str],
) -> None:
    tgtd.add_target(user=USER, outgoing=outgoing)
    path = tgtd.add_lun(make_disk(scratch / "lun", SIZE))
    sock = scratch / "nbd.sock"
    node = [*secrets(**passwords), *tgtd.node(**options)]
    with daemon(*node, *nbd_server_unix(sock), *nbd_export()):
        qemu_io(nbd_uri(sock), "write -P 0x77 1M 4k", "flush")
    assert path.read_bytes()[MIB : MIB + 4096] == b"\x77" * 4096


@pytest.mark.parametrize(
    ("options", "passwords", "message"),
    [
        (CHAP, {"pw": "wrong-password"}, "uthenticat"),
        ({**CHAP, "user": "bob"}, {"pw": USER.password}, "uthenticat"),
        ({}, {}, "uthenticat"),
        (MUTUAL, {"pw": USER.password, "back": "wrong-secret"}, "CHAP_R|uthenticat"),
        (
            {**MUTUAL, "mutual_user": "x"},
            {"pw": USER.password, "back": TARGET_SIDE.password},
            "targetname|uthent",
        ),
        (CHAP, {}, "option 'password-secret': No secret with id 'pw'"),
        ({"user": USER.user}, {}, "'password-secret'"),
    ],
)
def test_chap_that_fails(
    tgtd: Tgtd, scratch: Path, options: dict[str, str], passwords: dict[str, str], message: str
) -> None:
    tgtd.add_target(user=USER, outgoing=TARGET_SIDE)
    tgtd.add_lun(make_disk(scratch / "lun", SIZE))
    line = fails(*secrets(**passwords), *tgtd.node(**options))
    assert "node 'disk'" in line
    assert any(part in line for part in message.split("|")), line
    assert not any(secret in line for secret in passwords.values())


def test_mutual_chap_with_a_target_that_cannot_prove_itself(tgtd: Tgtd, scratch: Path) -> None:
    tgtd.add_target(user=USER)
    tgtd.add_lun(make_disk(scratch / "lun", SIZE))
    passwords = secrets(pw=USER.password, back=TARGET_SIDE.password)
    assert "node 'disk'" in fails(*passwords, *tgtd.node(**MUTUAL))


# ---- content ----


def through_qemu(tgtd: Tgtd, commands: list[str], lun: int = 1) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-d", "unmap", "-f", "raw", *words, tgtd.url(lun=lun))
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


async def read_all(address: Path, size: int) -> bytes:
    async with nbd_clients(address) as (client,):
        assert client.export.size == size
        return b"".join([await client.read(at, MIB) for at in range(0, size, MIB)])


@pytest.mark.parametrize("block_size", [512, 4096])
async def test_qemu_writes_and_we_read(tgtd: Tgtd, scratch: Path, start: Start, block_size: int) -> None:
    lun(tgtd, scratch, block_size=block_size)
    operations = Operations(SIZE, seed=block_size)
    through_qemu(tgtd, operations.commands(300))
    sock = scratch / "nbd.sock"
    start(*tgtd.node(), *nbd_server_unix(sock), *nbd_export(writable=False))
    data = await read_all(sock, SIZE)
    operations.agrees(data)
    qemu_img("compare", "-f", "raw", "-F", "raw", operations.file(scratch / "model", data), tgtd.url())


@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize("block_size", [512, 4096])
async def test_we_write_and_qemu_reads(
    tgtd: Tgtd, scratch: Path, start: Start, block_size: int, sessions: int
) -> None:
    """Three connections on two I/O threads, 24 operations in flight; then QEMU's driver compares."""
    path = lun(tgtd, scratch, block_size=block_size)
    fill(path, SIZE, seed=1)
    sock = scratch / "nbd.sock"
    threads = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
    started = start(
        *threads,
        *tgtd.node(sessions=sessions),
        *nbd_server_unix(sock),
        *("--export", json.dumps({**export, "iothread": ["t0", "t1"]})),
    )
    async with nbd_clients(sock, 3) as clients:
        model = Model(clients, bytearray(path.read_bytes()), seed=block_size + sessions)
        await model.run(1500, depth=24)
        await model.check_all()
        data = await read_all(sock, SIZE)
    started.stop()
    (scratch / "model").write_bytes(data)
    qemu_img("compare", "-f", "raw", "-F", "raw", scratch / "model", tgtd.url())


def flat_map(extents: list[dict[str, Any]]) -> list[tuple[int, int, bool]]:
    """Start, length and whether zeros, of extents of `qemu-img map`; neighbours merged."""
    merged: list[tuple[int, int, bool]] = []
    for extent in extents:
        at, length, zero = extent["start"], extent["length"], extent["zero"]
        if merged and merged[-1][2] == zero:
            merged[-1] = (merged[-1][0], merged[-1][1] + length, zero)
        else:
            merged.append((at, length, zero))
    return merged


@pytest.mark.parametrize("block_size", [512, 4096])
def test_discard_zeroes_and_status_agree_with_qemu(
    tgtd: Tgtd, scratch: Path, start: Start, block_size: int
) -> None:
    path = lun(tgtd, scratch, block_size=block_size)
    path.write_bytes(random.Random(3).randbytes(8 * MIB) + bytes(SIZE - 8 * MIB))
    (scratch / "twin").write_bytes(path.read_bytes())
    tgtd.add_lun(scratch / "twin", lun=2, block_size=block_size)
    sock = scratch / "nbd.sock"
    commands = [
        *("write -P 1 10M 1M", "discard 1M 1M", "discard 3M 64k", "write -z -u 5M 192k", "write -z 6M 128k"),
        *("discard 4000256 300032", "write -z -u 7000064 100352", "flush"),
    ]
    started = start(*tgtd.node(), *nbd_server_unix(sock), *nbd_export())
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-d", "unmap", "-f", "raw", *words, nbd_uri(sock))
    through_qemu(tgtd, commands, lun=2)
    ours = flat_map(image_map(nbd_uri(sock), "raw"))
    assert ours == flat_map(image_map(tgtd.url(), "raw"))
    started.stop()
    assert flat_map(image_map(tgtd.url(lun=2), "raw")) == ours
    qemu_img("compare", "-f", "raw", "-F", "raw", tgtd.url(), tgtd.url(lun=2))


def test_discards_stay_above_unless_allowed(mock: IscsiTarget, scratch: Path, start: Start) -> None:
    disk = mock.add_disk(SIZE)
    disk.fill(0, b"\1" * MIB)
    sock = scratch / "nbd.sock"
    start(*mock_node(mock, discard="ignore"), *nbd_server_unix(sock), *nbd_export())
    run("qemu-io", "-d", "unmap", "-f", "raw", "-c", "discard 0 1M", nbd_uri(sock))
    assert disk.commands[0x42] == 0 and disk.data[:MIB] == b"\1" * MIB


@pytest.mark.parametrize(
    "features",
    [
        Features(),
        Features(unmap=False),
        Features(write_same=False),
        Features(unmap=False, write_same=False, lba_status=False, thin=False),
        Features(reads_zeros=False),
        Features(max_transfer=8, max_unmap=64, max_unmap_descriptors=1, max_write_same=16),
        Features(unmap_granularity=128),
        Features(third_party_copy=False),
    ],
    ids=lambda features: ",".join(
        f"{name}={getattr(features, name)}"
        for name in features.__dataclass_fields__
        if getattr(features, name) != getattr(Features(), name)
    ),
)
@pytest.mark.parametrize("block_size", [512, 4096])
async def test_disks_that_can_less(
    mock: IscsiTarget, scratch: Path, start: Start, features: Features, block_size: int
) -> None:
    """The same results with whatever the LUN supports and limits."""
    disk = mock.add_disk(8 * MIB, features=features, block_size=block_size)
    disk.fill(0, random.Random(5).randbytes(3 * MIB))
    sock = scratch / "nbd.sock"
    start(*mock_node(mock), *nbd_server_unix(sock), *nbd_export())
    async with nbd_clients(sock, 2) as clients:
        model = Model(clients, bytearray(disk.data), seed=7)
        await model.run(300, depth=8)
        await model.check_all()
    for sector in set(range(len(disk.data) // 512)) - model.discarded:
        at = sector * 512
        assert disk.data[at : at + 512] == model.data[at : at + 512], f"sector {sector}"


@pytest.mark.parametrize("digest", ["crc32c", "none-crc32c", "crc32c-none", "none"])
def test_header_digests(mock: IscsiTarget, scratch: Path, start: Start, digest: str) -> None:
    """A target that insists, one way or the other."""
    wants = digest in ("crc32c", "crc32c-none")
    mock.limits = Limits(header_digest=("CRC32C", "None") if digest != "none-crc32c" else ("CRC32C",))
    disk = mock.add_disk(SIZE)
    sock = scratch / "nbd.sock"
    start(*mock_node(mock, header_digest=digest), *nbd_server_unix(sock), *nbd_export())
    qemu_io(nbd_uri(sock), "write -P 3 0 3M", "read -P 3 0 3M")
    assert disk.data[: 3 * MIB] == b"\3" * (3 * MIB)
    assert (mock.digests["header"] > 0) == (wants or digest == "none-crc32c")


@pytest.mark.parametrize(
    "limits",
    [
        Limits(initial_r2t=True, immediate_data=False),
        Limits(initial_r2t=True, max_burst=4096, first_burst=512, max_receive=512),
        Limits(immediate_data=False, first_burst=8192),
    ],
)
def test_ways_in_which_data_go(mock: IscsiTarget, scratch: Path, start: Start, limits: Limits) -> None:
    mock.limits = limits
    mock.max_data_in = 1000
    disk = mock.add_disk(SIZE)
    sock = scratch / "nbd.sock"
    start(*mock_node(mock), *nbd_server_unix(sock), *nbd_export())
    source = fill(scratch / "source", SIZE, seed=11)
    run("nbdcopy", source, nbd_uri(sock))
    run("nbdcopy", nbd_uri(sock), scratch / "back")
    assert (scratch / "back").read_bytes() == source.read_bytes() == disk.data


def test_no_flush_reaches_the_target_with_no_flush(mock: IscsiTarget, scratch: Path, start: Start) -> None:
    disk, quiet = mock.add_disk(SIZE), mock.add_disk(SIZE, lun=2)
    sock = scratch / "nbd.sock"
    start(
        *mock_node(mock),
        *mock_node(mock, 2, "quiet", cache={"no-flush": True}),
        *nbd_server_unix(sock),
        *(*nbd_export(), *nbd_export(node="quiet", name="quiet")),
    )
    for name in ("disk", "quiet"):
        qemu_io(nbd_uri(sock, name), "write -P 1 0 4k", "flush")
    assert disk.commands[0x35] + disk.commands[0x91] > 0
    assert quiet.commands[0x35] + quiet.commands[0x91] == 0
    assert quiet.data[:4096] == b"\1" * 4096


def test_read_only_luns(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    lun(tgtd, scratch, read_only=True)
    assert "write protected" in fails(*tgtd.node())
    sock = scratch / "nbd.sock"
    node = tgtd.node(auto_read_only=True)
    assert "read-only" in fails(*node, *nbd_server_unix(sock), *nbd_export())
    start(*tgtd.node(read_only=True), *nbd_server_unix(sock), *nbd_export(writable=False))
    assert json.loads(run("nbdinfo", "--json", nbd_uri(sock)).stdout)["exports"][0]["is_read_only"] is True


# ---- sizes ----


@pytest.mark.parametrize("size", [2 * SIZE, SIZE // 2])
async def test_a_new_capacity_reaches_nbd_clients(
    mock: IscsiTarget, scratch: Path, start: Start, size: int
) -> None:
    disk = mock.add_disk(SIZE)
    sock = scratch / "nbd.sock"
    start(*mock_node(mock), *nbd_server_unix(sock), *nbd_export())
    async with nbd_clients(sock) as (old,):
        await old.write(0, b"\1" * 4096)
        disk.resize(size)
        assert await old.read(0, 4096) == b"\1" * 4096  # the command that hears of it does not fail
        async with asyncio.timeout(10):
            while await told_size(sock) != size:
                await asyncio.sleep(0.05)
        async with nbd_clients(sock) as (new,):
            await new.write(size - 4096, b"\2" * 4096)
        assert disk.data[-4096:] == b"\2" * 4096
        if size < SIZE:
            with pytest.raises(OSError):
                await old.write(SIZE - 4096, b"\3" * 4096)
            with pytest.raises(OSError):
                await old.read(SIZE - 4096, 4096)


async def told_size(sock: Path) -> int:
    """What a new client is told."""
    async with nbd_clients(sock) as (client,):
        return client.export.size


def test_a_new_capacity_reaches_the_guest(mock: IscsiTarget, scratch: Path, start: Start) -> None:
    disk = mock.add_disk(SIZE)
    sock = scratch / "vhost.sock"
    start(*mock_node(mock), *vhost_user_export(sock))
    with FrontEnd.connect(str(sock)) as front_end, front_end.open_channel() as channel:
        assert struct.unpack("<Q", front_end.get_config(0, 8)) == (SIZE // 512,)
        disk.resize(3 * SIZE)
        front_end.read(0, 512)
        assert channel.recv(64) == messages.config_changed()
        assert struct.unpack("<Q", front_end.get_config(0, 8)) == (3 * SIZE // 512,)
        front_end.write(2 * SIZE // 512, b"\7" * 512)
    assert disk.data[2 * SIZE : 2 * SIZE + 512] == b"\7" * 512


# ---- copies inside of the target ----

COPY = 0x83


async def test_copy_between_two_luns_moves_no_data_through_us(mock: IscsiTarget) -> None:
    source, destination = mock.add_disk(SIZE), mock.add_disk(SIZE, lun=2)
    source.fill(MIB, random.Random(13).randbytes(20 * MIB))
    async with running_graph(threads=2) as graph:
        one = await graph.add({"node-name": "one", **mock_options(mock)})
        two = await graph.add({"node-name": "two", **mock_options(mock, 2)})
        await graph.datapath.copy(one.object, two.object, 0, 0, SIZE)
        await graph.datapath.copy(one.object, two.object, MIB, 24 * MIB, MIB)
    assert destination.data[: 24 * MIB] == source.data[: 24 * MIB]
    assert destination.data[24 * MIB : 25 * MIB] == source.data[MIB : 2 * MIB]
    assert source.commands[COPY] + destination.commands[COPY] > 0
    assert source.copies.copied + destination.copies.copied >= 21 * MIB
    assert not source.bytes_moved["read"] and not destination.bytes_moved["write"]


@pytest.mark.parametrize(
    "reason", ["not offered", "refused", "unreachable", "another target", "blocks", "unaligned"]
)
async def test_copy_where_the_target_does_not_is_made_by_us(mock: IscsiTarget, reason: str) -> None:
    features = Features(third_party_copy=reason != "not offered")
    other = "iqn.2026-11.org.example:other"
    source = mock.add_disk(4 * MIB, features=features)
    name = other if reason == "another target" else mock_options(mock)["target"]
    size = 4096 if reason == "blocks" else 512
    destination = mock.add_disk(4 * MIB, lun=2, target=name, block_size=size, features=features)
    source.fill(0, random.Random(17).randbytes(4 * MIB))
    if reason == "refused":
        mock.rule(faults.on_opcode(COPY), faults.sense(5, 0x20, 0))
    if reason == "unreachable":
        mock.rule(faults.on_opcode(COPY), faults.sense(0xA, 0x0D, 2))
    offset, length = (1, 3 * MIB) if reason == "unaligned" else (0, 4 * MIB)
    async with running_graph(threads=1) as graph:
        one = await graph.add({"node-name": "one", **mock_options(mock)})
        two = await graph.add({"node-name": "two", **mock_options(mock, 2, name)})
        await graph.datapath.copy(one.object, two.object, offset, 0, length)
    assert destination.data[:length] == source.data[offset : offset + length]
    assert source.bytes_moved["read"] >= length
