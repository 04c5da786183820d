# SPDX-License-Identifier: Apache-2.0
"""Faults: what the datapath cannot decide by itself and asks Python for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

from target.datapath._datapath import ffi, lib
from target.datapath.constants import Op, Reason, check


class Fault:
    """One parked request, or a part of one. It gets exactly one answer: retry() or done()."""

    __slots__ = ("_request", "flags", "length", "offset", "op", "reason", "result")

    def __init__(self, event: Any) -> None:
        self._request = event.request
        self.op = Op(event.op)
        self.flags: int = event.flags
        self.reason = Reason(event.reason)
        self.offset: int = event.offset
        self.length: int = event.length
        self.result: int = event.result  # the number of its I/O thread; for SAVE a negative errno

    def __repr__(self) -> str:
        return f"<Fault {self.reason.name} {self.op.name} {self.offset}+{self.length}>"

    @property
    def answered(self) -> bool:
        return self._request is None

    def _take(self) -> Any:
        request, self._request = self._request, None
        if request is None:
            raise RuntimeError(f"{self!r} was answered before")
        return request

    def retry(self) -> None:
        """The request resolves again: the table has changed."""
        lib.bt_fault_retry(self._take())

    def done(self, result: int = 0) -> None:
        """The part is done (0), or the request failed (negative errno)."""
        lib.bt_fault_done(self._take(), result)

    def get_data(self, at: int = 0, length: int | None = None) -> bytes:
        """A copy of the data that a WRITE carries, from ``at`` bytes into the part on."""
        data = bytearray(self.length - at if length is None else length)
        check(lib.bt_fault_get_data(self._request, at, ffi.from_buffer(data), len(data)))
        return bytes(data)

    def put_data(self, at: int, data: bytes | bytearray | memoryview) -> None:
        """Gives a READ the data for ``at`` bytes into the part on."""
        check(lib.bt_fault_put_data(self._request, at, ffi.from_buffer(data), len(data)))

    def get_into(self, buffer: Any, at: int, length: int) -> None:
        """Copies what a WRITE carries, from ``at`` bytes into the part on, into a buffer of C."""
        check(lib.bt_fault_get_data(self._request, at, buffer, length))

    def put_from(self, buffer: Any, at: int, length: int) -> None:
        """Gives a READ what a buffer of C holds."""
        check(lib.bt_fault_put_data(self._request, at, buffer, length))

    def put_extent(self, length: int, flags: int) -> bool:
        """Appends an extent to the answer of a STATUS; False when it takes no more."""
        result = lib.bt_fault_put_extent(self._request, length, flags)
        if result == -errno.ENOSPC:
            return False
        check(result)
        return True


# A handler that is no coroutine function answers later, by itself.
FaultHandler = Callable[[Fault], Coroutine[Any, Any, None] | None]
