# SPDX-License-Identifier: Apache-2.0
"""Guesses the format of a file from its first bytes, for a backing file whose format is not stated.

Used for files that are only read: what a guest could write must never decide how its own disk is opened.
"""

from __future__ import annotations

import os
import stat

PROBE_BYTES = 2048

# (offset, bytes, driver)
_MAGICS = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe(data: bytes) -> str:
    """The driver for an image that begins with ``data``; "raw" when nothing is known of it."""
    for offset, magic, driver in _MAGICS:
        if data[offset : offset + len(magic)] == magic:
            return driver
    return "raw"


def probe_file(filename: str) -> str:
    """The driver for a regular file or block device. OSError when it cannot be read."""
    fd = os.open(filename, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return "raw"  # which its protocol driver then refuses by name
        return probe(os.pread(fd, PROBE_BYTES, 0))
    finally:
        os.close(fd)


def protocol_driver(filename: str) -> str:
    """The driver for what lies at a path: "host_device" for a block device, else "file"."""
    try:
        return "host_device" if stat.S_ISBLK(os.stat(filename).st_mode) else "file"
    except OSError:
        return "file"  # which then says what is wrong
