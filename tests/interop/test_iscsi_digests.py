# SPDX-License-Identifier: Apache-2.0
"""Data digests of the iscsi driver (RFC 7143 sections 11.2.3 and 13.1).

With tgtd and the mock, which check those that we send, and past a relay that checks both directions by itself
and damages what passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.peers.iscsi_target import Account as MockAccount
from target.peers.iscsi_target import Disk, IscsiTarget, Limits, faults
from target.peers.iscsi_target.faults import Action, When
from target.peers.iscsi_target.pdu import Opcode, Pdu
from tests.support.daemon import Daemon, nbd_export, nbd_server_unix, nbd_uri
from tests.support.iscsi import MIB, fails, fresh, mock_node, mock_options, nbd_clients
from tests.support.iscsi_wire import Wire
from tests.support.nbd_model import Model
from tests.support.qcow2 import running_graph
from tests.support.tgtd import Account, Tgtd
from tests.support.tools import fill, qemu_img, qemu_io, run

Start = Callable[..., Daemon]
Lun = tuple[IscsiTarget, Disk]
SIZE = 2 * MIB
OFFERS = {
    "crc32c": "CRC32C",
    "none": "None",
    "crc32c-none": "CRC32C,None",
    "none-crc32c": "None,CRC32C",
}
READ, WRITE, READ_CAPACITY_16 = 0x28, 0x2A, 0x9E
WRONG = "the data digest of a PDU is wrong (opcode {:#x})"


@pytest.fixture
def lun() -> Iterator[Lun]:
    with fresh(size=SIZE) as made:
        yield made


@pytest.fixture
def tgtd(scratch: Path) -> Iterator[Tgtd]:
    with Tgtd(scratch) as target:
        target.add_target()
        target.add_lun(fill(scratch / "lun", SIZE, seed=1))
        yield target


async def random_use(sock: Path, data: bytes, steps: int) -> Model:
    """Writes that are large, so that data go in each way, then anything."""
    async with nbd_clients(sock, 2) as clients:
        model = Model(clients, bytearray(data), seed=3)
        for length in (512, 300_032, MIB):
            model.data[MIB : MIB + length] = random.Random(length).randbytes(length)
            await clients[0].write(MIB, bytes(model.data[MIB : MIB + length]))
        await model.run(steps, depth=8)
        await model.check_all()
    return model


def assert_digests(wire: Wire, kind: str, expected: bool) -> None:
    """All were right, and they were there if they had to be, on PDUs of each kind that has data."""
    assert not wire.problems
    kinds = {opcode for digested, opcode in wire.digests if digested == kind}
    wanted = {Opcode.SCSI_COMMAND, Opcode.DATA_OUT, Opcode.DATA_IN}
    assert wanted <= kinds if expected else not kinds


# ---- agreed ----


@pytest.mark.parametrize("header", ["crc32c", "none"])
@pytest.mark.parametrize("offer", OFFERS)
async def test_random_use_of_the_mock(lun: Lun, scratch: Path, start: Start, offer: str, header: str) -> None:
    """It takes the first that is offered, and where None is first insists on the other."""
    target, disk = lun
    target.limits = Limits(data_digest=("CRC32C",) if offer == "none-crc32c" else ("None", "CRC32C"))
    sock = scratch / "nbd.sock"
    with Wire(target.port) as wire:
        node = mock_node(target, header_digest=header, data_digest=offer, portal=wire.portal)
        started = start(*node, *nbd_server_unix(sock), *nbd_export())
        model = await random_use(sock, bytes(disk.data), 32)
        assert wire.offered == {OFFERS[offer]}
        assert_digests(wire, "data", offer != "none")
        assert_digests(wire, "header", header == "crc32c")
        assert "lost" not in started.output()
        started.stop()
    for sector in set(range(SIZE // 512)) - model.discarded:
        assert disk.data[sector * 512 :][:512] == model.data[sector * 512 :][:512], f"sector {sector}"


@pytest.mark.parametrize("header", ["crc32c", "none"])
@pytest.mark.parametrize(
    ("offer", "wanted"), [(offer, "CRC32C") for offer in OFFERS] + [("crc32c-none", "None")]
)
async def test_random_use_of_tgtd(
    tgtd: Tgtd, scratch: Path, start: Start, offer: str, wanted: str, header: str
) -> None:
    """Past the relay, then QEMU's driver (without data digests) compares."""
    path = scratch / "lun"
    tgtd.set("DataDigest", wanted)
    tgtd.set("HeaderDigest", header.upper().replace("NONE", "None"))
    sock = scratch / "nbd.sock"
    with Wire(tgtd.port) as wire:
        node = tgtd.node(header_digest=header, data_digest=offer, portal=wire.portal)
        started = start(*node, *nbd_server_unix(sock), *nbd_export())
        model = await random_use(sock, path.read_bytes(), 32)
        assert_digests(wire, "data", offer != "none" and wanted == "CRC32C")
        assert_digests(wire, "header", header == "crc32c")
        assert "lost" not in started.output()
        started.stop()
    stored = path.read_bytes()
    for sector in model.discarded:
        model.data[sector * 512 : sector * 512 + 512] = stored[sector * 512 : sector * 512 + 512]
    (scratch / "model").write_bytes(model.data)
    tgtd.set("DataDigest", "None")
    qemu_img("compare", "-f", "raw", "-F", "raw", scratch / "model", tgtd.url())


async def test_much_use_of_tgtd(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    """Two sessions on two I/O threads, without a relay that slows them."""
    tgtd.set("DataDigest", "CRC32C")
    sock = scratch / "nbd.sock"
    threads = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    node = tgtd.node(sessions=2, data_digest="crc32c", header_digest="none")
    started = start(*threads, *node, *nbd_server_unix(sock), *nbd_export())
    await random_use(sock, (scratch / "lun").read_bytes(), 2400)
    assert "lost" not in started.output()


@pytest.mark.parametrize("header", ["crc32c", "none"])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(initial_r2t=True, immediate_data=False),
        Limits(initial_r2t=True, max_burst=4096, first_burst=512, max_receive=515),
        Limits(immediate_data=False, first_burst=8192, max_receive=1022),
    ],
)
def test_ways_in_which_data_go(lun: Lun, scratch: Path, start: Start, limits: Limits, header: str) -> None:
    """In pieces that need padding, which the digest covers."""
    target, disk = lun
    target.limits, target.max_data_in = limits, 1001
    sock = scratch / "nbd.sock"
    node = mock_node(target, header_digest=header, data_digest="crc32c")
    started = start(*node, *nbd_server_unix(sock), *nbd_export())
    source = fill(scratch / "source", SIZE, seed=11)
    run("nbdcopy", source, nbd_uri(sock))
    assert disk.data == source.read_bytes()
    run("nbdcopy", nbd_uri(sock), scratch / "back")
    assert (scratch / "back").read_bytes() == source.read_bytes()
    assert target.digests["data"] == 1 and "lost" not in started.output()


def test_with_chap(tgtd: Tgtd, scratch: Path, start: Start) -> None:
    """The key is offered where it belongs: not while we prove who we are."""
    user, back = Account("alice", "a-password-123"), Account("target", "another-secret")
    name = tgtd.add_target("iqn.2026-11.org.example:chap", user=user, outgoing=back)
    path = tgtd.add_lun(fill(scratch / "other", SIZE, seed=2), target=name)
    tgtd.set("DataDigest", "CRC32C", target=name)
    sock = scratch / "nbd.sock"
    secrets = [f"secret,id=pw,data={user.password}", f"secret,id=back,data={back.password}"]
    with Wire(tgtd.port) as wire:
        started = start(
            *(word for value in secrets for word in ("--object", value)),
            *tgtd.node(
                target=name,
                data_digest="crc32c",
                portal=wire.portal,
                user=user.user,
                password_secret="pw",
                mutual_user=back.user,
                mutual_password_secret="back",
            ),
            *(*nbd_server_unix(sock), *nbd_export()),
        )
        qemu_io(nbd_uri(sock), "write -P 0x77 1M 128k", "read -P 0x77 1M 128k", "flush")
        started.stop()
        assert_digests(wire, "data", expected=True)
    assert path.read_bytes()[MIB : MIB + 4096] == b"\x77" * 4096


async def test_a_target_that_pings_with_data(lun: Lun) -> None:
    target, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(target, data_digest="crc32c")})
        for length in (1, 4, 5, 4000):
            for connection in list(target.connections):
                connection.ping(random.Random(length).randbytes(length))
            assert await node.read(0, 65536) == disk.data[:65536]
        assert len(target.connections) == 1 and target.digests["data"] == 1


# ---- damaged ----


def on_response(*opcodes: int) -> tuple[When, Action]:
    """Sense data have a wrong digest."""
    damage = faults.flipped(-1, opcode=Opcode.SCSI_RESPONSE)
    return faults.on_opcode(*opcodes), faults.first(damage, faults.sense(6, 0x29))


DAMAGE: dict[str, tuple[Action, int, int]] = {
    "digest of the first": (faults.wrong_data_digest(), READ, Opcode.DATA_IN),
    "digest of the third": (faults.wrong_data_digest(3), READ, Opcode.DATA_IN),
    "first byte": (faults.flipped(48), READ, Opcode.DATA_IN),
    "byte in the middle": (faults.flipped(48 + 7777, 2), READ, Opcode.DATA_IN),
    "last byte": (faults.flipped(-5, 4), READ, Opcode.DATA_IN),
    "digest of sense data": (on_response(READ)[1], READ, Opcode.SCSI_RESPONSE),
    "digest of sense data of a write": (on_response(WRITE)[1], WRITE, Opcode.SCSI_RESPONSE),
}


@pytest.mark.parametrize("case", DAMAGE)
async def test_damage_is_noticed(lun: Lun, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Right bytes over a new connection, and one line that says why."""
    target, disk = lun
    target.max_data_in = 32768
    action, command, opcode = DAMAGE[case]
    async with running_graph() as graph:
        options = mock_options(target, data_digest="crc32c", header_digest="none")
        node = await graph.add({"node-name": "disk", **options})
        rule = target.rule(faults.on_opcode(command), action, count=2)
        data = random.Random(9).randbytes(256 << 10)
        if command == WRITE:
            await node.write(MIB, data)
            assert disk.data[MIB : MIB + len(data)] == data
        else:
            assert await node.read(512, 256 << 10) == disk.data[512 : 512 + (256 << 10)]
        assert rule.acted == 2 and target.digests["data"] == 3
    lost = [record.getMessage() for record in caplog.records if "lost the connection" in record.getMessage()]
    assert len(lost) == 2 and all(line.startswith("node 'disk'") for line in lost), lost
    assert all(WRONG.format(opcode) in line for line in lost), lost


async def test_damage_that_does_not_end(lun: Lun) -> None:
    """EIO at last, for what is damaged, and the rest goes on."""
    target, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(target, data_digest="crc32c")})
        damaged = target.rule(
            lambda connection, request: (
                request.opcode == Opcode.SCSI_COMMAND and request.cdb[0] == READ and request.cdb[5] == 8
            ),
            faults.wrong_data_digest(),
        )
        with pytest.raises(OSError) as error:
            await node.read(4096, 4096)
        assert error.value.errno == 5 and damaged.acted == 6
        assert await node.read(8192, 4096) == disk.data[8192:12288]


async def test_without_them_damage_stays_unnoticed(lun: Lun) -> None:
    """It is the digest that finds it."""
    target, disk = lun
    async with running_graph() as graph:
        node = await graph.add({"node-name": "disk", **mock_options(target, header_digest="crc32c")})
        target.rule(faults.on_opcode(READ), faults.flipped(48 + 4), count=1)
        assert await node.read(0, 4096) == bytes((disk.data[0] ^ 0x10,)) + disk.data[1:4096]


@pytest.mark.parametrize("header", ["crc32c", "none"])
async def test_damage_between_tgtd_and_us(tgtd: Tgtd, scratch: Path, start: Start, header: str) -> None:
    tgtd.set("DataDigest", "CRC32C")
    tgtd.set("HeaderDigest", header.upper().replace("NONE", "None"))
    sock = scratch / "nbd.sock"
    with Wire(tgtd.port) as wire:
        node = tgtd.node(data_digest="crc32c", header_digest=header, portal=wire.portal)
        started = start(*node, *nbd_server_unix(sock), *nbd_export())
        async with nbd_clients(sock) as (client,):
            for nth in (1, 3):
                wire.damage_data_in = nth
                assert await client.read(0, MIB) == (scratch / "lun").read_bytes()[:MIB]
                assert not wire.damage_data_in
        assert started.output().count(WRONG.format(Opcode.DATA_IN)) == 2
        started.stop()
        assert not wire.problems


# ---- refused ----


def answers(wanted: bytes) -> Action:
    """The login response has this in place of what it says about data digests."""

    def change(raw: bytes) -> bytes:
        keys = [key for key in raw[48:].split(b"\0") if key and not key.startswith(b"DataDigest=")]
        text = b"".join(key + b"\0" for key in (*keys, *([wanted] if wanted else [])))
        return raw[:5] + len(text).to_bytes(3, "big") + raw[8:48] + text

    return faults.changed(change)


def operational_login(connection: Any, request: Pdu) -> bool:
    return request.opcode == Opcode.LOGIN and request.flags >> 2 & 3 == 1


@pytest.mark.parametrize(
    "answer", [b"DataDigest=Reject", b"DataDigest=NotUnderstood", b"DataDigest=None", b""]
)
def test_a_target_that_does_not_agree(lun: Lun, answer: bytes) -> None:
    target, _ = lun
    target.rule(operational_login, answers(answer))
    line = fails(*mock_node(target, data_digest="crc32c"))
    assert (
        "node 'disk'" in line and "data digests are demanded, and the target does not agree to them" in line
    )


@pytest.mark.parametrize("answer", [b"DataDigest=Reject", b"DataDigest=None", b""])
def test_a_target_that_need_not_agree(lun: Lun, scratch: Path, start: Start, answer: bytes) -> None:
    target, _ = lun
    target.limits = Limits(data_digest=("None",))
    target.rule(operational_login, answers(answer))
    sock = scratch / "nbd.sock"
    start(*mock_node(target, data_digest="crc32c-none"), *nbd_server_unix(sock), *nbd_export())
    qemu_io(nbd_uri(sock), "write -P 3 0 1M", "read -P 3 0 1M")
    assert target.digests["data"] == 0


def test_a_target_that_wants_what_was_not_offered(lun: Lun) -> None:
    target, _ = lun
    target.rule(operational_login, answers(b"DataDigest=CRC32C"))
    line = fails(*mock_node(target))
    assert "the target wants data digests, which were not offered" in line


def test_header_digests_that_are_demanded(lun: Lun) -> None:
    target, _ = lun
    target.limits = Limits(header_digest=("None",))
    assert "header digests are demanded" in fails(*mock_node(target, header_digest="crc32c"))


def test_tgtd_that_does_not_agree(tgtd: Tgtd) -> None:
    tgtd.set("DataDigest", "None")
    line = fails(*tgtd.node(data_digest="crc32c"))
    assert "node 'disk'" in line and "igest" in line, line


def test_damage_while_it_is_opened(lun: Lun) -> None:
    target, _ = lun
    target.rule(faults.on_opcode(READ_CAPACITY_16), faults.wrong_data_digest())
    assert WRONG.format(Opcode.DATA_IN) in fails(*mock_node(target, data_digest="crc32c"))


def test_a_mock_that_knows_its_user(scratch: Path, start: Start) -> None:
    with fresh(MockAccount("user", "password1234"), SIZE) as (target, _):
        sock = scratch / "nbd.sock"
        secret = ("--object", "secret,id=pw,data=password1234")
        node = mock_node(target, data_digest="crc32c", user="user", password_secret="pw")
        started = start(*secret, *node, *nbd_server_unix(sock), *nbd_export())
        qemu_io(nbd_uri(sock), "write -P 3 0 1M", "read -P 3 0 1M")
        started.stop()
        assert target.digests["data"] == 1
