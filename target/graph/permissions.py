# SPDX-License-Identifier: Apache-2.0
"""What a user of a node needs (``perm``) and what it lets others do meanwhile (``shared``).

The names, bits and default rules are QEMU's: the bits appear in lock bytes of image files, which other
programs test, and the words appear in messages that tools match.
"""

from __future__ import annotations

from enum import Flag


class Perm(Flag):
    """Permission bits. The value of a bit is 1 << (its lock byte - 100)."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


NAMES = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}


def describe(perm: Perm) -> str:
    """The bits in words, as they appear in messages: "write, resize"."""
    return ", ".join(name for bit, name in NAMES.items() if bit in perm)


def for_filter(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A node that passes requests on needs of its child what its own users need of it."""
    return perm, shared


def for_format(perm: Perm, shared: Perm, read_only: bool) -> tuple[Perm, Perm]:
    """A format's metadata: always consistent, and changed by nobody else; written even without a user."""
    perm |= Perm.CONSISTENT_READ
    if not read_only:
        perm |= Perm.WRITE | Perm.RESIZE
    return perm, shared & ~(Perm.WRITE | Perm.RESIZE)


def for_backing(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A backing node is read; it may change only where the users of the overlay can bear that."""
    changes = Perm.WRITE | Perm.RESIZE if Perm.WRITE in shared else Perm.NONE
    return perm & Perm.CONSISTENT_READ, changes | Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
