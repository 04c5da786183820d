# SPDX-License-Identifier: Apache-2.0
"""Errors that both programs give, each in its words. What else differs on purpose: Policy in qmp_state.

This list is reviewed: any other difference is a failure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.support.qmp_pair import Answer, plain


class Difference(NamedTuple):
    """An error that both programs give, each in its words, and why ours are better than theirs."""

    command: str  # regular expressions
    peer: str
    ours: str
    why: str


_PERMISSIONS = r"Permission conflict|Block node is read-only|Failed to get .* lock"
_OTHER_FIRST = "two things are wrong, and the other is found first"

REVIEWED = [
    Difference(".*", r"(The sum of o|O)ffset .*", r"Specified size is not multiple of 512", _OTHER_FIRST),
    Difference(
        "blockdev-snapshot|transaction",
        r"Making .*|The overlay .*",
        r"The overlay is .* in use",
        _OTHER_FIRST,
    ),
    Difference(
        "blockdev-reopen", r"Block format 'copy-on-read' .*", r".*", "it can be, and something is wrong"
    ),
    Difference("nbd-server-add|block-export-add", r"NBD server .*", _PERMISSIONS, _OTHER_FIRST),
    Difference(
        "blockdev-reopen",
        r"Read-only block node '.*' cannot support read-write users",
        r"Block node is read-only",
        "the user is a node above it, whose permissions are found later here",
    ),
    # Of two nodes that are reopened, both wrongly.
    Difference("blockdev-reopen", r"Failed to find node with .*", r".*", _OTHER_FIRST),
    Difference("blockdev-reopen", r"setting detect-zeroes .*", r".* is missing .*", _OTHER_FIRST),
    Difference("blockdev-reopen", r"Cannot find .*", r"(Cannot change|backing is missing) .*", _OTHER_FIRST),
    Difference("blockdev-add", r".*", r"setting detect-zeroes to unmap is not allowed .*", _OTHER_FIRST),
    Difference("blockdev-add", r".*", r"(Duplicate nodes with|Invalid|Node name too) .*", _OTHER_FIRST),
    Difference("blockdev-add", _PERMISSIONS, r".* qcow2 .*", _OTHER_FIRST),
    Difference("blockdev-add", _PERMISSIONS, _PERMISSIONS, _OTHER_FIRST),
    Difference(
        "blockdev-add", r"Making '.*' a .* would create a cycle", r"Cannot find .*", "it is not there yet"
    ),
    Difference(
        ".*", r"Image is not in qcow2 format", r"the file is too short for a qcow2 header.*", "says why"
    ),
]


def same_error(command: str, peer: Answer, ours: Answer) -> bool:
    if peer.error is None or ours.error is None:
        return True
    if peer.error[0] != ours.error[0]:
        return False
    theirs, own = plain(peer.error[1]), plain(ours.error[1])
    return theirs == own or any(
        re.fullmatch(difference.command, command)
        and re.fullmatch(difference.peer, theirs)
        and re.fullmatch(difference.ours, own)
        for difference in REVIEWED
    )
