# SPDX-License-Identifier: Apache-2.0
"""What makes the target misbehave: rules that say when, and actions that say how.

target.rule(on_opcode(0x28), status(BUSY), count=3)
target.rule(on_pdu(Opcode.LOGIN), raw(b"garbage" * 100))
target.rule(on_opcode(0x9E), data(b"\\0" * 7))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from target.peers.iscsi_target.pdu import Opcode, Pdu
from target.peers.iscsi_target.sense import CHECK_CONDITION, GOOD, Result, Sense

if TYPE_CHECKING:
    from target.peers.iscsi_target.connection import Connection

When = Callable[["Connection", Pdu], bool]
Action = Callable[["Connection", Pdu], bool]
"""True: the request is dealt with. False: the target goes on as it would."""


@dataclass
class Rule:
    when: When
    action: Action
    after: int = 0
    """requests that match and pass first"""
    count: int = -1
    """how often it acts; negative: always"""
    acted: int = 0

    def act(self, connection: Connection, request: Pdu) -> bool:
        """Whether the request is dealt with."""
        if not self.count or not self.when(connection, request):
            return False
        if self.after:
            self.after -= 1
            return False
        self.count -= 1
        self.acted += 1
        return self.action(connection, request)


# ---- when ----


def on_pdu(opcode: Opcode) -> When:
    return lambda connection, request: request.opcode == opcode


def on_opcode(*opcodes: int) -> When:
    """A SCSI command with one of these operation codes."""
    return lambda connection, request: request.opcode == Opcode.SCSI_COMMAND and request.cdb[0] in opcodes


def on_service_action(opcode: int, action: int) -> When:
    return lambda connection, request: (
        request.opcode == Opcode.SCSI_COMMAND and request.cdb[0] == opcode and request.cdb[1] & 0x1F == action
    )


def always(connection: Connection, request: Pdu) -> bool:
    return True


# ---- how ----


def ends(result: Result) -> Action:
    """The command ends with this, undone. Data that is on its way is taken and dropped."""

    def act(connection: Connection, request: Pdu) -> bool:
        connection.finish(request, result)
        return True

    return act


def status(code: int) -> Action:
    return ends(Result(code))


def sense(key: int, asc: int, ascq: int = 0, response_code: int = 0x70) -> Action:
    return ends(Result(CHECK_CONDITION, sense=Sense(key, asc, ascq).encode(response_code)))


def raw_sense(sense: bytes) -> Action:
    return ends(Result(CHECK_CONDITION, sense=sense))


def data(answer: bytes) -> Action:
    """A read ends well, with these data."""
    return ends(Result(GOOD, answer))


def raw(answer: bytes, close: bool = False) -> Action:
    """Any bytes in place of an answer."""

    def act(connection: Connection, request: Pdu) -> bool:
        connection.send_raw(answer)
        if close:
            connection.close()
        return True

    return act


def changed(change: Callable[[bytes], bytes]) -> Action:
    """Each PDU that answers the request is sent changed."""

    def act(connection: Connection, request: Pdu) -> bool:
        connection.filter = change
        return False

    return act


def patched(at: int, value: bytes) -> Action:
    """Each PDU that answers has these bytes in its header."""
    return changed(lambda pdu: pdu[:at] + value + pdu[at + len(value) :])


def flipped(at: int, nth: int = 1, opcode: Opcode = Opcode.DATA_IN) -> Action:
    """A bit of the nth of the PDUs with data that answer, counted from 1, is another on the wire.

    ``at``: a byte of the whole PDU, digests and all; negative: from its end.
    """

    def act(connection: Connection, request: Pdu) -> bool:
        seen = 0

        def change(encoded: bytes) -> bytes:
            nonlocal seen
            seen += encoded[0] & 0x3F == opcode and any(encoded[5:8])
            if seen != nth:
                return encoded
            seen += 1
            bad = bytearray(encoded)
            bad[at] ^= 0x10
            return bytes(bad)

        connection.wire = change
        return False

    return act


def wrong_data_digest(nth: int = 1) -> Action:
    """The nth Data-In that answers has a data digest (RFC 7143 section 11.2.3) that is wrong."""
    return flipped(-1, nth)


def wrong_tag() -> Action:
    """The answer names a task that nobody started (RFC 7143 section 11.2.1.8)."""
    return patched(16, b"\x12\x34\x56\x78")


def cut(after: int) -> Action:
    """So many bytes of the answer come, then the connection is gone."""

    def act(connection: Connection, request: Pdu) -> bool:
        def change(pdu: bytes) -> bytes:
            connection.send_raw(pdu[:after])
            connection.close()
            return b""

        connection.filter = change
        return False

    return act


def hang_up(connection: Connection, request: Pdu) -> bool:
    connection.close()
    return True


def silence(connection: Connection, request: Pdu) -> bool:
    """No answer, ever; the rest goes on."""
    return True


def stuck(until: threading.Event) -> Action:
    """The whole connection stands until the event."""

    def act(connection: Connection, request: Pdu) -> bool:
        while not until.wait(0.1) and not connection.closed:
            pass
        return False

    return act


def delayed(seconds: float) -> Action:
    def act(connection: Connection, request: Pdu) -> bool:
        time.sleep(seconds)
        return False

    return act


def first(*actions: Action) -> Action:
    """Several, one after the other, until one has dealt with the request."""
    return lambda connection, request: any(action(connection, request) for action in actions)
