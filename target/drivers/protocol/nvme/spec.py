# SPDX-License-Identifier: Apache-2.0
"""Registers, commands and structures of NVMe, declared once as data.

Sections are those of the NVM Express Base Specification, revision 1.4, unless they say otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

PAGE = 4096
CLASS_CODE = 0x010802  # mass storage, NVM, NVM Express I/O controller
SUBMISSION_ENTRY, COMPLETION_ENTRY = 64, 16


class Register(IntEnum):
    """Section 3.1: offsets in BAR 0."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30


DOORBELLS = 0x1000
GONE = 0xFFFF_FFFF  # what a register of a device that has gone reads as


class Cc:
    """Section 3.1.5, Controller Configuration: pages of 4096 bytes, the NVM command set."""

    ENABLE = 1
    SHUTDOWN_NORMAL = 1 << 14
    SHUTDOWN_MASK = 3 << 14
    ENTRY_SIZES = 6 << 16 | 4 << 20


class Csts:
    """Section 3.1.6, Controller Status."""

    READY = 1
    FATAL = 2
    SHUTDOWN_MASK = 3 << 2
    SHUTDOWN_COMPLETE = 2 << 2


class Capabilities(NamedTuple):
    """Section 3.1.1, CAP."""

    queue_entries: int
    timeout: float
    """seconds, to become ready or not ready"""
    stride: int
    """bytes from one doorbell to the next"""
    command_sets: int
    """CAP.CSS"""
    page_min: int
    """bytes"""

    @classmethod
    def parse(cls, cap: int) -> Capabilities:
        return cls(
            queue_entries=(cap & 0xFFFF) + 1,
            timeout=(cap >> 24 & 0xFF) * 0.5,
            stride=4 << (cap >> 32 & 0xF),
            command_sets=cap >> 37 & 0xFF,
            page_min=PAGE << (cap >> 48 & 0xF),
        )

    @property
    def nvm(self) -> bool:
        return bool(self.command_sets & 1)

    @property
    def several_command_sets(self) -> bool:
        """Revision 2.0: data structures of a command set can be identified."""
        return bool(self.command_sets >> 6 & 1)


class Admin(IntEnum):
    """Section 5: opcodes."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C


class Cns(IntEnum):
    """Section 5.15.1: what to identify."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    DESCRIPTORS = 0x03
    COMMAND_SET_CONTROLLER = 0x06  # revision 2.0


class Feature(IntEnum):
    """Section 5.21.1."""

    NUMBER_OF_QUEUES = 0x07
    ASYNC_EVENTS = 0x0B


ERROR_LOG = 0x01  # section 5.14.1.1
CHANGED_NAMESPACES_LOG = 0x04
ERROR_ENTRY = 64
NAMESPACE_NOTICES = 1 << 8  # section 5.21.1.11: Namespace Attribute Notices
EVENT_ERROR, EVENT_NOTICE = 0, 2  # section 5.2: types of asynchronous events
NOTICE_NAMESPACE = 0
QUEUE_CONTIGUOUS, QUEUE_INTERRUPTS = 1, 2  # section 5.3 and 5.4: bits of CDW11
SUBMISSION = struct.Struct(
    "<BBHIQQQQ6I"
)  # section 4.2: opcode, flags, cid, nsid, -, mptr, prp1, prp2, cdw10-15
COMPLETION = struct.Struct("<IIHHHH")  # section 4.6: dw0, dw1, sq head, sq id, cid, phase and status

# Section 4.6.1.2.1 and following, for messages: status code type << 8 | status code.
STATUS_NAMES = {
    0x001: "invalid command opcode",
    0x002: "invalid field in command",
    0x004: "data transfer error",
    0x005: "commands aborted due to power loss notification",
    0x006: "internal error",
    0x007: "command abort requested",
    0x008: "command aborted due to SQ deletion",
    0x00B: "invalid namespace or format",
    0x013: "invalid use of controller memory buffer",
    0x01C: "sanitize failed",
    0x01D: "sanitize in progress",
    0x020: "namespace is write protected",
    0x021: "command interrupted",
    0x022: "transient transport error",
    0x080: "LBA out of range",
    0x081: "capacity exceeded",
    0x082: "namespace not ready",
    0x083: "reservation conflict",
    0x084: "format in progress",
    0x101: "invalid queue identifier",
    0x102: "invalid queue size",
    0x103: "abort command limit exceeded",
    0x108: "invalid interrupt vector",
    0x109: "invalid log page",
    0x180: "conflicting attributes",
    0x182: "attempted write to read only range",
    0x280: "write fault",
    0x281: "unrecovered read error",
    0x282: "end-to-end guard check error",
    0x285: "compare failure",
    0x286: "access denied",
    0x287: "deallocated or unwritten logical block",
}


def status_name(status: int) -> str:
    """status: status code type << 8 | status code."""
    return f"{STATUS_NAMES.get(status, 'status')} ({status:#05x})"


Layout = Mapping[str, tuple[int, str]]

# Section 5.15.2.2 (figure "Identify Controller Data Structure"): offset and format.
IDENTIFY_CONTROLLER: Layout = {
    "vid": (0, "H"),
    "sn": (4, "20s"),
    "mn": (24, "40s"),
    "fr": (64, "8s"),
    "mdts": (77, "B"),
    "cntlid": (78, "H"),
    "ver": (80, "I"),
    "rtd3e": (88, "I"),
    "oaes": (92, "I"),
    "acl": (258, "B"),
    "elpe": (262, "B"),
    "sqes": (512, "B"),
    "cqes": (513, "B"),
    "nn": (516, "I"),
    "oncs": (520, "H"),
    "vwc": (525, "B"),
    "subnqn": (768, "256s"),
}
# Section 5.15.2.1 (figure "Identify Namespace Data Structure, NVM Command Set Specific").
IDENTIFY_NAMESPACE: Layout = {
    "nsze": (0, "Q"),
    "ncap": (8, "Q"),
    "nuse": (16, "Q"),
    "nsfeat": (24, "B"),
    "nlbaf": (25, "B"),
    "flbas": (26, "B"),
    "dps": (29, "B"),
    "dlfeat": (33, "B"),
    "nsattr": (99, "B"),
    "nguid": (104, "16s"),
    "eui64": (120, "8s"),
}
LBA_FORMATS, LBA_FORMAT = 128, struct.Struct("<HBB")  # ms, lbads, rp; 64 of them at most
# Section 5.15.2.3, Namespace Identification Descriptor: type and length; then so many bytes.
DESCRIPTOR = struct.Struct("<BBxx")
COMMAND_SET_DESCRIPTOR = 4  # revision 2.0
NVM_COMMAND_SET = 0
# NVM Command Set Specification 1.0, section 4.1.5.4: of CNS 06h.
IDENTIFY_NVM: Layout = {
    "vsl": (0, "B"),
    "wzsl": (1, "B"),
    "dmrl": (3, "B"),
    "dmrsl": (4, "I"),
    "dmsl": (8, "Q"),
}
# Section 5.14.1.1.
ERROR_LOG_ENTRY: Layout = {
    "error_count": (0, "Q"),
    "sqid": (8, "H"),
    "cid": (10, "H"),
    "status": (12, "H"),
    "parameter": (14, "H"),
    "lba": (16, "Q"),
    "nsid": (24, "I"),
}


def unpack(layout: Layout, data: bytes) -> dict[str, Any]:
    """The fields of a structure by the specification's names."""
    return {name: struct.unpack_from(f"<{form}", data, at)[0] for name, (at, form) in layout.items()}
