# SPDX-License-Identifier: Apache-2.0
"""The messages between a target and the process of a plugin, over a unix stream socket.

First each side sends one frame (a length and JSON): the target what to load, the process what it found. Then
requests go one way and replies the other, each a small fixed structure. Data and extents lie in shared
memory, in the request's slot.
"""

from __future__ import annotations

import json
import struct
from typing import Any

FRAME = struct.Struct("<I")  # length of the JSON that follows
FRAME_MAX = 1 << 20

REQUEST = struct.Struct("<BBHIQ")  # op, flags (nbdkit's), slot, length, offset
REPLY = struct.Struct("<BBHi")  # kind, 0, slot, result
EXTENT = struct.Struct("<QI")  # length, type

SLOTS = 64
SLOT_BYTES = 512 << 10  # larger reads and writes are split; the pieces of an NBD connection fit
MEMORY_BYTES = SLOTS * SLOT_BYTES
EXTENTS_MAX = SLOT_BYTES // EXTENT.size
COUNT_MAX = (1 << 32) - 1  # bytes of one request without data

# Operations: the datapath's numbers, and the end of the connection.
READ, WRITE, ZEROES, DISCARD, FLUSH, STATUS, CACHE, CLOSE = range(8)

# Flags of a request: nbdkit's numbers.
MAY_TRIM, FUA, REQ_ONE, FAST_ZERO = 1, 2, 4, 8

# Kinds of replies. DONE: result is 0, a number of extents, or a negative errno. The others answer no request.
DONE, SHUTDOWN, DISCONNECT = range(3)


def frame(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return FRAME.pack(len(body)) + body
