# SPDX-License-Identifier: Apache-2.0
"""What the scriptable NBD server is told: what it offers, how it answers, and where it goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from target.exports.nbd.protocol import TransmissionFlag
from target.peers.nbd_replies import Request

ALL_FLAGS = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)


@dataclass
class ServerOptions:
    """What the server offers. Sizes in bytes."""

    size: int = 64 << 20
    name: str = "disk"
    description: str = ""
    flags: TransmissionFlag = ALL_FLAGS
    blocks: tuple[int, int, int] = (1, 4096, 32 << 20)
    """minimum, preferred, maximum payload"""
    tell_blocks: bool = True
    fixed: bool = True
    """fixed newstyle; without it EXPORT_NAME is all there is"""
    go: bool = True
    structured: bool = True
    extended: bool = False
    allocation: bool = True
    bitmaps: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """dirty extents (offset, length) in order, by the bitmap's name"""
    tls_required: bool = False
    # ---- legal ways to answer ----
    chunk: int = 0
    """bytes of a content chunk at most, 0 for any number"""
    holes: bool = True
    simple_replies: bool = False
    """to requests without content, in spite of structured replies"""
    extents: int = 1 << 16
    """in one status reply at most"""
    past_end: bool = False
    """the last extent goes on past the request, where that is known"""
    shuffle: int | None = None
    """seed: replies, and the chunks of each, in any order and interleaved"""
    delay: float = 0
    """seconds before each reply"""


class Ending(Enum):
    """Ways to say no more on a connection."""

    CUT = "closes"
    RESET = "closes so that the client gets ECONNRESET"
    STALL = "goes on reading, silent"
    DEAF = "reads nothing any more"


@dataclass(frozen=True)
class Pause:
    seconds: float


Action = bytes | Pause | Ending


@dataclass
class Step:
    """What the server is about to send. ``about``: "greeting", or the name of an Option or a Command."""

    about: str
    messages: list[bytes]
    option: int = 0
    request: Request | None = None

    @property
    def asked(self) -> Request:
        assert self.request is not None, self.about
        return self.request


Change = Callable[[Step], list[Action]]


@dataclass
class Armed:
    """A fault that strikes at the ``nth`` step of its kind, over all connections, and ``times - 1`` later."""

    change: Change
    about: str
    nth: int = 0
    times: int = 1
    seen: int = 0

    def strikes(self, about: str) -> bool:
        if about != self.about:
            return False
        self.seen += 1
        return self.nth < self.seen <= self.nth + self.times
