# SPDX-License-Identifier: Apache-2.0
"""What NVMe structures mean, by values in the specification; and any bytes at all."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from target.drivers.protocol.nvme.errors import ControllerError
from target.drivers.protocol.nvme.identify import (
    ControllerFacts,
    NamespaceFacts,
    command_set,
    parse_error_log,
    text,
)
from target.drivers.protocol.nvme.spec import SUBMISSION, Admin, Capabilities, status_name

# The first bytes of what QEMU 7.2's controller identifies itself with, and where its other fields lie.
QEMU = {
    0: bytes.fromhex("361bf41a") + b"deadbeef".ljust(20) + b"QEMU NVMe Ctrl".ljust(40) + b"7.2.22  ",
    77: b"\x07",
    80: bytes.fromhex("00040100"),
    92: bytes.fromhex("00010000"),
    258: b"\x03",
    512: b"\x66\x44",
    516: bytes.fromhex("00010000"),
    520: bytes.fromhex("5d01"),
    525: b"\x07",
    768: b"nqn.2019-08.org.qemu:deadbeef".ljust(256, b"\0"),
}


def page(parts: dict[int, bytes]) -> bytes:
    data = bytearray(4096)
    for at, part in parts.items():
        data[at : at + len(part)] = part
    return bytes(data)


def test_a_controller_of_qemu() -> None:
    facts = ControllerFacts.parse(page(QEMU), bytes(4096))
    assert (facts.model, facts.serial, facts.firmware) == ("QEMU NVMe Ctrl", "deadbeef", "7.2.22")
    assert facts.version == "1.4.0" and facts.subsystem == "nqn.2019-08.org.qemu:deadbeef"
    assert facts.max_transfer == 512 << 10 and facts.namespaces == 256 and facts.aborts == 4
    assert facts.volatile_cache and facts.discard and facts.write_zeroes and facts.namespace_notices


def test_limits_of_the_command_set() -> None:
    nvm = page(
        {0: bytes([0, 5, 0, 8]), 4: (1 << 16).to_bytes(4, "little"), 8: (1 << 20).to_bytes(8, "little")}
    )
    facts = ControllerFacts.parse(page(QEMU), nvm)
    assert facts.zeroes_bytes == 128 << 10 and facts.discard_ranges == 8
    assert facts.discard_range_blocks == 1 << 16 and facts.discard_blocks == 1 << 20


def test_a_namespace() -> None:
    parts = {0: (1000).to_bytes(8, "little"), 25: b"\x01", 26: b"\x01", 33: b"\x09", 99: b"\x01"}
    formats = {128: bytes([0, 0, 9, 0]), 132: bytes([0, 0, 12, 0])}
    facts = NamespaceFacts.parse(3, page({**parts, **formats}))
    assert (facts.size, facts.block_size) == (4096000, 4096)
    assert facts.zeros_when_deallocated and facts.zeroes_may_deallocate and facts.write_protected


def test_capabilities() -> None:
    """2048 entries, 7.5 s, doorbells 4 bytes apart, pages from 4096 bytes."""
    cap = Capabilities.parse(0x004018200F0107FF)
    assert cap == Capabilities(2048, 7.5, 4, 0xC1, 4096)
    assert cap.nvm and cap.several_command_sets


def test_commands_have_64_bytes() -> None:
    entry = SUBMISSION.pack(Admin.IDENTIFY, 0, 0x1234, 1, 0, 0, 0x1000, 0, 1, 0, 0, 0, 0, 0)
    assert len(entry) == 64
    assert (
        entry[:4] == b"\x06\x00\x34\x12" and entry[24:32] == (0x1000).to_bytes(8, "little") and entry[40] == 1
    )


def test_statuses() -> None:
    assert status_name(0x281) == "unrecovered read error (0x281)"
    assert status_name(0x7FF) == "status (0x7ff)"


def test_text_is_printable() -> None:
    assert text(b"a\x1b[31mb\n\xffc \0\0") == "a[31mb\N{REPLACEMENT CHARACTER}c"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.binary(max_size=600))
def test_any_bytes(first: bytes, second: bytes) -> None:
    """A controller may say anything: it is understood, or refused."""
    one, other = first.ljust(4096, b"\0"), second.ljust(4096, b"\0")
    with contextlib.suppress(ControllerError):
        facts = ControllerFacts.parse(one, other)
        assert 0 < facts.shutdown <= 60 and facts.max_transfer < 1 << 60
    with contextlib.suppress(ControllerError):
        namespace = NamespaceFacts.parse(1, one)
        assert 0 < namespace.size < 1 << 63 and namespace.block_size in (512, 1024, 2048, 4096)
    assert 0 <= command_set(first) < 256
    assert len(parse_error_log(one)) <= 64
