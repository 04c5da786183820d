# SPDX-License-Identifier: Apache-2.0
"""Ways in which the scriptable NBD server misbehaves, by name.

A fault changes what the server is about to send in one step (nbd_script.Step). Those of ``OPENING`` strike in
the handshake; those of ``REPLYING`` in transmission, most of them in nbd_reply_faults.py, which adds them.
What is rare but allowed is not here: see ServerOptions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from target.exports.nbd.protocol import (
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION_REPLY,
    REPLY_MAGIC,
    Info,
    Reply,
    encode_reply,
)
from target.peers.nbd_script import Action, Armed, Change, Ending, Pause, Step

OLDSTYLE_MAGIC = 0x00420281861253
GARBAGE = bytes(range(251, 0, -3)) * 20


@dataclass(frozen=True)
class Fault:
    """``steps``: where it may strike. ``silent``: a client notices only because time passes."""

    name: str
    change: Change
    steps: tuple[str, ...]
    silent: bool = False

    def at(self, step: str, nth: int = 0, times: int = 1) -> Armed:
        assert step in self.steps, f"{self.name} does not strike at {step}"
        return Armed(self.change, step, nth, times)


OPENING: dict[str, Fault] = {}
REPLYING: dict[str, Fault] = {}

HANDSHAKE = ("STRUCTURED_REPLY", "EXTENDED_HEADERS", "SET_META_CONTEXT", "GO")
ANY = ("READ", "WRITE", "FLUSH", "TRIM", "WRITE_ZEROES", "BLOCK_STATUS", "CACHE")


def _opening(name: str, *steps: str, silent: bool = False) -> Callable[[Change], Change]:
    return _register(OPENING, name, steps, silent)


def replying(name: str, *steps: str, silent: bool = False) -> Callable[[Change], Change]:
    return _register(REPLYING, name, steps, silent)


def _register(
    into: dict[str, Fault], name: str, steps: tuple[str, ...], silent: bool
) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        into[name] = Fault(name, change, steps, silent)
        return change

    return keep


# ---- wherever something is sent ----

GREETING_AND_OPTIONS = ("greeting", *HANDSHAKE)


@_opening("close", *GREETING_AND_OPTIONS)
@replying("close", *ANY)
def close(step: Step) -> list[Action]:
    return [Ending.CUT]


@_opening("reset", *GREETING_AND_OPTIONS)
@replying("reset", *ANY)
def reset(step: Step) -> list[Action]:
    return [Ending.RESET]


@_opening("stall", *GREETING_AND_OPTIONS, silent=True)
@replying("stall", *ANY, silent=True)
def stall(step: Step) -> list[Action]:
    return [Ending.STALL]


@_opening("cut-short", *GREETING_AND_OPTIONS)
@replying("cut-short", *ANY)
def cut_short(step: Step) -> list[Action]:
    """One byte is missing."""
    return [b"".join(step.messages)[:-1], Ending.CUT]


@_opening("stall-short", *GREETING_AND_OPTIONS, silent=True)
@replying("stall-short", *ANY, silent=True)
def stall_short(step: Step) -> list[Action]:
    return [b"".join(step.messages)[:-1], Ending.STALL]


@_opening("cut-in-header", *GREETING_AND_OPTIONS)
@replying("cut-in-header", *ANY)
def cut_in_header(step: Step) -> list[Action]:
    return [step.messages[0][:7], Ending.CUT]


@_opening("garbage", *GREETING_AND_OPTIONS)
@replying("garbage", *ANY)
def garbage(step: Step) -> list[Action]:
    return [GARBAGE, Ending.STALL]


# ---- the greeting ----


@_opening("other-protocol", "greeting")
def other_protocol(step: Step) -> list[Action]:
    return [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", Ending.STALL]


@_opening("wrong-magic", "greeting")
def wrong_magic(step: Step) -> list[Action]:
    return [GREETING.pack(NBDMAGIC + 1, IHAVEOPT, 3), Ending.STALL]


@_opening("wrong-second-magic", "greeting")
def wrong_second_magic(step: Step) -> list[Action]:
    return [GREETING.pack(NBDMAGIC, IHAVEOPT + 1, 3), Ending.STALL]


@_opening("oldstyle", "greeting")
def oldstyle(step: Step) -> list[Action]:
    return [struct.pack(">QQQI", NBDMAGIC, OLDSTYLE_MAGIC, 1 << 20, 1) + bytes(124), Ending.STALL]


@_opening("trickle-for-ever", "greeting", silent=True)
def trickle(step: Step) -> list[Action]:
    """A byte now and then: something always comes, but never enough."""
    return [*[part for byte in step.messages[0][:-1] for part in (bytes([byte]), Pause(1))], Ending.STALL]


# ---- replies to options ----


def _header(step: Step, kind: int, length: int, content: bytes = b"", magic: int = REPLY_MAGIC) -> bytes:
    return OPTION_REPLY.pack(magic, step.option, kind, length) + content


@_opening("option-magic", *HANDSHAKE)
def option_magic(step: Step) -> list[Action]:
    return [_header(step, Reply.ACK, 0, magic=REPLY_MAGIC ^ 0xFF), Ending.STALL]


@_opening("option-other", *HANDSHAKE)
def option_other(step: Step) -> list[Action]:
    """A reply to an option that the client did not send."""
    return [encode_reply(step.option + 77, Reply.ACK), Ending.STALL]


@_opening("option-4gib", *HANDSHAKE)
def option_4gib(step: Step) -> list[Action]:
    return [_header(step, Reply.ACK, 0xFFFFFFFF, bytes(4096)), Ending.STALL]


@_opening("option-32mib", *HANDSHAKE)
def option_32mib(step: Step) -> list[Action]:
    return [_header(step, Reply.INFO, 32 << 20), *[bytes(1 << 20)] * 32, Ending.STALL]


@_opening("option-ack-with-data", *HANDSHAKE)
def option_ack_with_data(step: Step) -> list[Action]:
    return [*step.messages[:-1], encode_reply(step.option, Reply.ACK, b"data"), Ending.STALL]


@_opening("option-unknown-reply", *HANDSHAKE)
def option_unknown_reply(step: Step) -> list[Action]:
    return [encode_reply(step.option, 77, b"what is it"), Ending.STALL]


@_opening("option-huge-error", "GO")
def option_huge_error(step: Step) -> list[Action]:
    return [encode_reply(step.option, Reply.ERR_POLICY, b"no " * (1 << 20)), Ending.STALL]


@_opening("option-endless", *HANDSHAKE, silent=True)
def option_endless(step: Step) -> list[Action]:
    """Replies without end, each allowed by itself."""
    info = struct.pack(">H", 0x7777) + b"x" * 100
    kind = Reply.META_CONTEXT if step.about == "SET_META_CONTEXT" else Reply.INFO
    return [*[encode_reply(step.option, kind, info) * 100] * 10_000, Ending.STALL]


# ---- GO ----


def _infos(step: Step, *infos: bytes) -> list[Action]:
    """Only these, then ACK."""
    return [*(encode_reply(step.option, Reply.INFO, info) for info in infos), step.messages[-1]]


def _export(size: int, flags: int = 0xDED) -> bytes:
    return struct.pack(">HQH", Info.EXPORT, size, flags)


def _blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", Info.BLOCK_SIZE, minimum, preferred, maximum)


MALFORMED_INFOS: dict[str, list[bytes]] = {
    "go-without-info": [],
    "go-empty-info": [_export(1 << 20), b""],
    "go-half-type": [_export(1 << 20), b"\0"],
    "go-export-short": [_export(1 << 20)[:-1]],
    "go-export-long": [_export(1 << 20) + b"\0"],
    "go-size-2^63": [_export(1 << 63)],
    "go-size-2^64-1": [_export((1 << 64) - 1)],
    "go-without-has-flags": [_export(1 << 20, 0xDEC)],
    "go-blocks-short": [_export(1 << 20), _blocks(1, 4096, 1 << 25)[:-1]],
    "go-minimum-0": [_export(1 << 20), _blocks(0, 4096, 1 << 25)],
    "go-minimum-3": [_export(1 << 20), _blocks(3, 4096, 1 << 25)],
    "go-minimum-128k": [_export(1 << 20), _blocks(1 << 17, 1 << 17, 1 << 25)],
    "go-preferred-0": [_export(1 << 20), _blocks(512, 0, 1 << 25)],
    "go-preferred-below-minimum": [_export(1 << 20), _blocks(4096, 512, 1 << 25)],
    "go-preferred-1000": [_export(1 << 20), _blocks(1, 1000, 1 << 25)],
    "go-maximum-0": [_export(1 << 20), _blocks(512, 4096, 0)],
    "go-maximum-below-minimum": [_export(1 << 20), _blocks(4096, 4096, 512)],
}


def _malformed(infos: list[bytes]) -> Change:
    return lambda step: _infos(step, *infos)


for _name, _list in MALFORMED_INFOS.items():
    _opening(_name, "GO")(_malformed(_list))


# ---- SET_META_CONTEXT ----


def _context(step: Step, number: int, name: bytes) -> bytes:
    return encode_reply(step.option, Reply.META_CONTEXT, struct.pack(">I", number) + name)


@_opening("meta-not-asked", "SET_META_CONTEXT")
def meta_not_asked(step: Step) -> list[Action]:
    return [_context(step, 9, b"base:weather"), *step.messages, Ending.STALL]


@_opening("meta-twice", "SET_META_CONTEXT")
def meta_twice(step: Step) -> list[Action]:
    return [step.messages[0], *step.messages, Ending.STALL]


@_opening("meta-short", "SET_META_CONTEXT")
def meta_short(step: Step) -> list[Action]:
    return [encode_reply(step.option, Reply.META_CONTEXT, b"\0\0\1"), step.messages[-1], Ending.STALL]


@_opening("meta-not-utf8", "SET_META_CONTEXT")
def meta_not_utf8(step: Step) -> list[Action]:
    return [_context(step, 1, b"base:\xff\xfe"), step.messages[-1], Ending.STALL]
