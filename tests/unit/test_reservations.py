# SPDX-License-Identifier: Apache-2.0
"""Persistent reservations: commands by their bytes, answers right and wrong, and the rules of a device."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from target.peers.iscsi_target.disk import Disk
from target.peers.iscsi_target.sense import Sense as DeviceSense
from target.reservations import (
    CheckCondition,
    Conflict,
    InAction,
    OutAction,
    Registration,
    Reservations,
    ScsiError,
    Sense,
    Type,
    client,
    commands,
    transports,
)
from target.reservations.commands import Malformed
from target.reservations.sense import parse_sense

MIB = 1 << 20
A, B = "iqn.2026-11.org.example:a,i,0x0001", "iqn.2026-11.org.example:b,i,0x0002"


# ---- bytes ----


def test_commands_have_the_bytes_of_the_standard() -> None:
    """Written down from SPC-4 tables 201, 207 and 214."""
    register = commands.reserve_out(OutAction.REGISTER_IGNORE, sa_key=0x1122334455667788, aptpl=True)
    assert register.cdb.hex() == "5f060000000000001800"
    assert register.data_out.hex() == "000000000000000011223344556677880000000001000000"
    preempt = commands.reserve_out(
        OutAction.PREEMPT, key=1, sa_key=2, type=Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
    )
    assert preempt.cdb.hex() == "5f040600000000001800"
    assert preempt.data_out.hex() == "000000000000000100000000000000020000000000000000"
    assert commands.reserve_in(InAction.READ_KEYS, 4096).cdb.hex() == "5e000000000000100000"
    assert commands.reserve_in(InAction.READ_FULL_STATUS)[1:] == (b"", 8192)


@pytest.mark.parametrize("key", [-1, 1 << 64])
def test_a_key_has_64_bits(key: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        commands.reserve_out(OutAction.RESERVE, key=key)


def test_transfer_lengths() -> None:
    assert commands.transfer_length(bytes.fromhex("5f000000000102030400")) == 0x01020304
    assert commands.transfer_length(bytes.fromhex("5e000000000000102000")) == 0x1020
    with pytest.raises(ValueError, match="0x12"):
        commands.transfer_length(bytes.fromhex("120000000000"))


def test_keys() -> None:
    data = struct.pack(">IIQQ", 7, 16, 1, 2)
    assert commands.parse_keys(data) == (7, [1, 2], False)
    assert commands.parse_keys(data[:20]) == (7, [1], True)
    assert commands.parse_keys(struct.pack(">II", 0, 0)) == (0, [], False)
    assert commands.parse_keys(data + b"more than the device said") == (7, [1, 2], False)


@pytest.mark.parametrize("data", [b"", bytes(7), struct.pack(">II5x", 0, 5)])
def test_keys_that_are_none(data: bytes) -> None:
    with pytest.raises(Malformed):
        commands.parse_keys(data)


def test_reservation() -> None:
    data = bytes.fromhex("00000009 00000010 00000000000000ab 00000000 00 05 0000")
    assert commands.parse_reservation(data) == (9, 0xAB, 0, Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
    assert commands.parse_reservation(struct.pack(">II", 3, 0)) is None
    with pytest.raises(Malformed):
        commands.parse_reservation(data[:20])
    with pytest.raises(Malformed, match="type 2"):
        commands.parse_reservation(data[:21] + b"\2\0\0")


def test_capabilities() -> None:
    found = commands.parse_capabilities(bytes.fromhex("0008 15 81 ea01 0000"))
    assert found.types == sorted(Type)
    assert found.persist_through_power_loss and found.power_loss_active and found.all_target_ports
    assert not found.specify_initiator_ports and found.replaces_reserve
    assert commands.parse_capabilities(bytes.fromhex("0008000000000000")).types is None
    for wrong in (b"", bytes(8), bytes.fromhex("0008150000")):
        with pytest.raises(Malformed):
            commands.parse_capabilities(wrong)


def descriptor(key: int, flags: int, kind: int, transport: bytes, length: int | None = None) -> bytes:
    size = len(transport) if length is None else length
    return struct.pack(">Q4xBB4xHI", key, flags, kind, 1, size) + transport


def test_full_status() -> None:
    iscsi = b"\x45\0\0\x0ciqn.a,i,0x1\0"
    sas = bytes.fromhex("0600000050000000000000010000000000000000")
    body = descriptor(1, 1, 6, iscsi) + descriptor(2, 2, 9, sas)
    found = commands.parse_full_status(struct.pack(">II", 0, len(body)) + body)
    assert found == [
        Registration(1, True, False, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY, 1, "iqn.a,i,0x1"),
        Registration(2, False, True, None, 1, sas.hex()),
    ]


@pytest.mark.parametrize("length", [41, 0xFFFFFFFF])
def test_full_status_whose_descriptor_is_longer_than_what_came(length: int) -> None:
    body = descriptor(1, 0, 0, bytes(20)) + descriptor(2, 0, 0, bytes(20), length)
    found = commands.parse_full_status(struct.pack(">II", 0, 0xFFFFFFF0) + body)
    assert [one.key for one in found] == [1]


def test_sense() -> None:
    assert parse_sense(DeviceSense(5, 0x24, 0).encode()) == (5, 0x24, 0)
    assert parse_sense(DeviceSense(6, 0x2A, 3).encode(0x72)) == (6, 0x2A, 3)
    assert parse_sense(b"\x70\0\5") == (5, 0, 0)
    assert parse_sense(b"\x70\0\5\0\0\0\0\0\0\0\0\0\x24\0") == (5, 0, 0)  # it says that no more follows
    for none in (b"", b"\x70", b"\x72\1\2", b"\0" * 18, b"\x7f" * 18):
        assert parse_sense(none) is None
    assert str(Sense(6, 0x2A, 3)) == "UNIT ATTENTION, reservations preempted (2a/03)"


# ---- a device ----


class Nexus:
    """Commands to a disk as one of its initiators; ``answers`` come before the disk's own."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name
        self.answers: list[tuple[int, bytes, bytes]] = []

    async def scsi_command(
        self, cdb: bytes, data_out: bytes, data_in_length: int
    ) -> tuple[int, bytes, bytes]:
        if self.answers:
            return self.answers.pop(0)
        result = self.disk.execute(self.name, cdb, data_out)
        return result.status, result.sense, result.data[:data_in_length]

    def reads(self) -> bool:
        return self.disk.execute(self.name, bytes.fromhex("28000000000000000100"), b"").status == 0

    def writes(self) -> bool:
        return self.disk.execute(self.name, bytes.fromhex("2a000000000000000100"), bytes(512)).status == 0


@pytest.fixture
def pair() -> tuple[Nexus, Nexus]:
    disk = Disk(MIB)
    return Nexus(disk, A), Nexus(disk, B)


async def test_register_reserve_release_unregister(pair: tuple[Nexus, Nexus]) -> None:
    first, second = (Reservations(nexus) for nexus in pair)
    await first.register(0, 0xA)
    with pytest.raises(Conflict):
        await first.register(0, 0xAA)  # it has a key
    await first.register(0xA, 0xAA)
    await second.register(0, 0xB, ignore=True)
    keys = await second.read_keys()
    assert (keys.generation, sorted(keys.keys)) == (3, [0xB, 0xAA])
    assert await first.read_reservation() is None
    await first.reserve(0xAA, Type.WRITE_EXCLUSIVE)
    found = await second.read_reservation()
    assert found is not None and (found.key, found.type) == (0xAA, Type.WRITE_EXCLUSIVE)
    with pytest.raises(Conflict):
        await second.reserve(0xB, Type.WRITE_EXCLUSIVE)
    await second.release(0xB, Type.WRITE_EXCLUSIVE)  # not the holder: nothing happens
    assert await second.read_reservation() is not None
    with pytest.raises(CheckCondition, match="invalid release"):
        await first.release(0xAA, Type.EXCLUSIVE_ACCESS)
    await first.release(0xAA, Type.WRITE_EXCLUSIVE)
    await first.register(0xAA, 0)
    await second.register(0xB, 0)
    assert (await first.read_keys()).keys == []


@pytest.mark.parametrize(
    ("kind", "registered", "reads", "writes"),
    [
        (Type.WRITE_EXCLUSIVE, True, True, False),
        (Type.EXCLUSIVE_ACCESS, True, False, False),
        (Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, True, True, True),
        (Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, False, True, False),
        (Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY, True, True, True),
        (Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY, False, False, False),
        (Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, False, True, False),
        (Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS, True, True, True),
        (Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS, False, False, False),
    ],
)
async def test_what_a_reservation_forbids(
    pair: tuple[Nexus, Nexus], kind: Type, registered: bool, reads: bool, writes: bool
) -> None:
    first, second = pair
    await Reservations(first).register(0, 1)
    if registered:
        await Reservations(second).register(0, 2)
    await Reservations(first).reserve(1, kind)
    assert first.reads() and first.writes()
    assert (second.reads(), second.writes()) == (reads, writes)


@pytest.mark.parametrize("abort", [False, True])
async def test_preempt_takes_over_and_the_other_hears_of_it(pair: tuple[Nexus, Nexus], abort: bool) -> None:
    first, second = (Reservations(nexus) for nexus in pair)
    await first.register(0, 1)
    await first.reserve(1, Type.EXCLUSIVE_ACCESS)
    await second.register(0, 2)
    await second.preempt(2, 1, Type.WRITE_EXCLUSIVE, abort=abort)
    found = await second.read_reservation()
    assert found is not None and (found.key, found.type) == (2, Type.WRITE_EXCLUSIVE)
    assert not pair[0].writes()  # a unit attention, not carried out
    assert (await first.read_keys()).keys == [2]
    await second.clear(2)
    assert await second.read_reservation() is None


async def test_unit_attentions_are_passed_and_told(pair: tuple[Nexus, Nexus]) -> None:
    first, second = (Reservations(nexus) for nexus in pair)
    await first.register(0, 1)
    await second.register(0, 2)
    await second.clear(2)
    assert (await first.read_keys()).keys == []
    assert first.attentions == ["UNIT ATTENTION, reservations preempted (2a/03)"]
    assert second.attentions == []


async def test_attentions_without_end(pair: tuple[Nexus, Nexus]) -> None:
    attention = (2, DeviceSense(6, 0x29, 0).encode(), b"")
    pair[0].answers = [attention] * 1000
    with pytest.raises(CheckCondition, match="power on"):
        await Reservations(pair[0]).read_keys()
    assert len(pair[0].answers) == 1000 - client.ATTENTIONS_MAX - 1


async def test_busy_devices_are_asked_again(
    pair: tuple[Nexus, Nexus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", 0.001)
    device = Reservations(pair[0])
    pair[0].answers = [(0x08, b"", b""), (0x28, b"", b"")]
    assert (await device.read_keys()).keys == []
    pair[0].answers = [(0x08, b"", b"")] * 100
    with pytest.raises(ScsiError, match="BUSY"):
        await device.read_keys()
    pair[0].answers = [(0x30, b"", b"")]
    with pytest.raises(ScsiError, match="status 0x30"):
        await device.read_keys()


async def test_what_the_device_refuses_is_said(pair: tuple[Nexus, Nexus]) -> None:
    with pytest.raises(CheckCondition, match="ILLEGAL REQUEST, invalid field in parameter list") as caught:
        await Reservations(pair[0]).register(0, 1, aptpl=True)
    assert caught.value.sense == (5, 0x26, 0)
    pair[0].answers = [(2, b"", b"")]
    with pytest.raises(CheckCondition, match="without sense data"):
        await Reservations(pair[0]).read_keys()


async def test_reports(pair: tuple[Nexus, Nexus]) -> None:
    device = Reservations(pair[0])
    await device.register(0, 1)
    await device.reserve(1, Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
    assert await device.read_full_status() == [
        Registration(1, True, False, Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, 1, A)
    ]
    assert (await device.report_capabilities()).types == sorted(Type)


# ---- SG_IO ----


def test_sg_io_needs_a_scsi_device(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as handle, pytest.raises(OSError) as caught:
        transports.sg_io(handle.fileno(), bytes.fromhex("5e000000000000200000"), b"", 8192)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(ValueError, match="both directions"):
        transports.sg_io(0, b"", b"x", 1)


def test_sg_io_fills_the_header_and_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's side is played: struct sg_io_hdr of scsi/sg.h has 88 bytes."""

    def ioctl(fd: int, number: int, header: bytearray) -> int:
        assert (fd, number, len(header)) == (5, 0x2285, 88)
        interface, direction, length, sense_max, _, size = struct.unpack_from("@iiBBHI", header)
        data, command, sense = struct.unpack_from("@PPP", header, 16)
        assert (interface, direction, length, sense_max, size) == (ord("S"), -3, 10, 96, 16)
        assert ctypes.string_at(command, length) == cdb
        ctypes.memmove(data, b"twelve bytes", 12)
        ctypes.memmove(sense, b"\x70\0\1", 3)
        struct.pack_into("@BBBBHHi", header, 64, status, 0, 0, 3, host, 8, 4)
        return 0

    cdb = bytes.fromhex("5e000000000000001000")
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    status, host = 0, 0
    assert transports.sg_io(5, cdb, b"", 16) == (0, b"\x70\0\1", b"twelve bytes")
    status = 2
    assert transports.sg_io(5, cdb, b"", 16) == (2, b"\x70\0\1", b"")
    status, host = 0x18, 0x11
    assert transports.sg_io(5, cdb, b"", 16).status == 0x18
    status, host = 0, 3
    with pytest.raises(TimeoutError):
        transports.sg_io(5, cdb, b"", 16)


# ---- the client's side of a helper ----

Serve = Callable[[socket.socket], None]
READ_KEYS = commands.reserve_in(InAction.READ_KEYS)


@pytest.fixture
def helper_of(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """helper_of(serve) gives a client of a helper that treats its only connection so."""
    monkeypatch.setattr(transports, "ATTEMPT_SECONDS", 0.01)
    monkeypatch.setattr(transports, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(transports, "COMMAND_SECONDS", 0.5)
    listener = socket.socket(socket.AF_UNIX)
    threads: list[threading.Thread] = []

    def begin(serve: Serve) -> transports.Helper:
        def work() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        listener.bind(str(scratch / "helper"))
        listener.listen()
        threads.append(threading.Thread(target=work))
        threads[0].start()
        return transports.Helper(str(scratch / "helper"), 0)

    yield begin
    for thread in threads:
        thread.join(10)
    listener.close()


def answering(response: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.sendall(bytes(4))
        assert connection.recv(4) == bytes(4)
        data, fds, _, _ = socket.recv_fds(connection, 16, 4)
        for fd in fds:
            os.close(fd)
        assert data == READ_KEYS.cdb + bytes(6) and len(fds) == 1
        connection.sendall(response)

    return serve


async def test_an_answer_of_a_helper(helper_of: Any) -> None:
    keys = struct.pack(">IIQ", 1, 8, 0xAB)
    device = Reservations(helper_of(answering(struct.pack(">iI96x", 0, len(keys)) + keys)))
    assert (await device.read_keys()).keys == [0xAB]


@pytest.mark.parametrize(
    ("response", "number"),
    [
        (struct.pack(">iI96x", 0, 8193) + bytes(8193), errno.EPROTO),
        (struct.pack(">iI96x", 0, 0xFFFFFFFF), errno.EPROTO),
        (struct.pack(">iI96x", 2, 8) + bytes(8), errno.EPROTO),
        (struct.pack(">iI90x", 0, 0), errno.ECONNRESET),
        (struct.pack(">iI96x", 0, 16) + bytes(8), errno.ECONNRESET),
    ],
)
async def test_answers_that_are_none(helper_of: Any, response: bytes, number: int) -> None:
    with pytest.raises(OSError) as caught:
        await Reservations(helper_of(answering(response))).read_keys()
    assert caught.value.errno == number


async def test_a_helper_that_is_silent(helper_of: Any) -> None:
    stop = threading.Event()
    device = Reservations(helper_of(lambda connection: stop.wait(10) and None))
    with pytest.raises(TimeoutError):
        await device.read_keys()
    stop.set()


async def test_no_helper(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "ATTEMPT_SECONDS", 0.01)
    with pytest.raises(FileNotFoundError):
        await Reservations(transports.Helper(str(scratch / "none"), 0)).read_keys()


def test_a_helper_takes_only_reservations(scratch: Path) -> None:
    helper = transports.Helper(str(scratch / "none"), 0)
    for cdb, data, length in (
        (bytes.fromhex("12000000ff00"), b"", 255),
        (bytes.fromhex("5e000000000000210000"), b"", 8448),
        (bytes.fromhex("5e000000000000200000"), b"", 8),
    ):
        with pytest.raises(ValueError):
            helper.run(cdb, data, length)
