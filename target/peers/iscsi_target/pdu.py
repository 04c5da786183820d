# SPDX-License-Identifier: Apache-2.0
"""iSCSI PDUs (RFC 7143 section 11): headers, digests and text keys, as a target reads and writes them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

BHS_SIZE = 48
DIGEST_SIZE = 4
FINAL = 0x80
READ, WRITE = 0x40, 0x20
"""flags of a SCSI Command"""
NO_TAG = 0xFFFFFFFF
MAX_DATA_SEGMENT = 1 << 20  # bytes that this target takes in one PDU; more is a broken peer
NO_LUN = bytes(8)


class Opcode(IntEnum):
    """RFC 7143 section 11.2.1.2."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_MANAGEMENT = 0x02
    LOGIN = 0x03
    TEXT = 0x04
    DATA_OUT = 0x05
    LOGOUT = 0x06
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


class PduError(Exception):
    """The peer broke the protocol."""


@dataclass(frozen=True)
class Pdu:
    """One PDU: the basic header segment and the data segment. Additional headers are read and dropped."""

    header: bytes
    data: bytes = b""

    @property
    def opcode(self) -> int:
        return self.header[0] & 0x3F

    @property
    def immediate(self) -> bool:
        return bool(self.header[0] & 0x40)

    @property
    def flags(self) -> int:
        return self.header[1]

    @property
    def lun(self) -> bytes:
        return self.header[8:16]

    @property
    def itt(self) -> int:
        return self.word(16)

    @property
    def cmd_sn(self) -> int:
        return self.word(24)

    @property
    def cdb(self) -> bytes:
        return self.header[32:48]

    def word(self, at: int) -> int:
        value: int = struct.unpack_from(">I", self.header, at)[0]
        return value


def make(
    opcode: int,
    *,
    flags: int = FINAL,
    itt: int = NO_TAG,
    lun: bytes = NO_LUN,
    data: bytes = b"",
    byte2: int = 0,
    byte3: int = 0,
    words: Mapping[int, int] | None = None,
) -> Pdu:
    """A PDU with the 32-bit fields of its kind by their offset in the header."""
    header = bytearray(BHS_SIZE)
    header[0:4] = bytes((opcode, flags, byte2, byte3))
    header[5:8] = len(data).to_bytes(3, "big")
    header[8:16] = lun
    struct.pack_into(">I", header, 16, itt)
    for at, value in (words or {}).items():
        struct.pack_into(">I", header, at, value & 0xFFFFFFFF)
    return Pdu(bytes(header), data)


def encode(pdu: Pdu, header_digest: bool, data_digest: bool) -> bytes:
    raw = bytearray(pdu.header)
    if header_digest:
        raw += digest(pdu.header)
    if pdu.data:
        padded = pdu.data + bytes(-len(pdu.data) % 4)
        raw += padded
        if data_digest:
            raw += digest(padded)
    return bytes(raw)


def decode(receive: Callable[[int], bytes], header_digest: bool, data_digest: bool) -> Pdu:
    """Reads one PDU. ``receive`` gives exactly so many bytes. PduError when a digest or a length is wrong."""
    header = receive(BHS_SIZE)
    covered = header + receive(header[4] * 4)
    if header_digest and receive(4) != digest(covered):
        raise PduError("wrong header digest")
    length = int.from_bytes(header[5:8], "big")
    if length > MAX_DATA_SEGMENT:
        raise PduError(f"a data segment of {length} bytes")
    padded = receive(length + -length % 4)
    if data_digest and length and receive(4) != digest(padded):
        raise PduError("wrong data digest")
    return Pdu(header, padded[:length])


def encode_text(keys: Mapping[str, str]) -> bytes:
    return b"".join(f"{key}={value}\0".encode() for key, value in keys.items())


def decode_text(data: bytes) -> dict[str, str]:
    """Keys of a Login or Text request. PduError for what is no list of keys."""
    keys: dict[str, str] = {}
    for part in data.split(b"\0"):
        if part:
            key, separator, value = part.decode(errors="replace").partition("=")
            if not separator:
                raise PduError(f"text without a key: {part[:40]!r}")
            keys[key] = value
    return keys


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 7143 section 12.1."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def digest(data: bytes) -> bytes:
    """On the wire the least significant byte comes first."""
    return crc32c(data).to_bytes(4, "little")
