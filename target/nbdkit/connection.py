# SPDX-License-Identifier: Apache-2.0
"""One connection to a plugin: its handle, what it says it can do, and the requests.

What nbdkit's server does between a client and a plugin's callbacks is done here: emulated FUA, zeroes that
fall back to writes, caching by reading, block status that is checked.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Any

from target.nbdkit import wire
from target.nbdkit.plugin import Failed, Plugin, as_int, as_long, as_text
from target.nbdkit.wire import FAST_ZERO, FUA, MAY_TRIM

# Any other number that is not 0 emulates FUA, and calls cache.
FUA_NONE, FUA_EMULATE, FUA_NATIVE = 0, 1, 2
CACHE_EMULATE, CACHE_NATIVE = 1, 2
DATA = 0  # the type of an extent that is neither a hole nor zeros
ZEROS_MAX = 64 << 20  # of one pwrite that stands for a zero
MINIMUM_MAX = 1 << 16
PREFERRED = range(512, (32 << 20) + 1)
UNLIMITED = (1 << 32) - 1

# What a client of nbdkit would see; what is not named here is EINVAL.
ERRORS = {
    errno.EPERM: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.EIO: errno.EIO,
    errno.ENOMEM: errno.ENOMEM,
    errno.ENOSPC: errno.ENOSPC,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.ESHUTDOWN: errno.ESHUTDOWN,
    errno.EOPNOTSUPP: errno.EOPNOTSUPP,
}


class Connection:
    """From ``open`` to ``close``. ``request`` may run in several threads."""

    def __init__(self, plugin: Plugin, export: str, readonly: bool) -> None:
        self.plugin = plugin
        self.server = plugin.server
        self.find = plugin.find
        self.call = plugin.call
        self.export = export
        self.readonly = readonly
        self.handle: Any = None
        self.pread = self._pread_v1 if plugin.api == 1 else self._pread_v2
        self.operations: dict[int, Callable[[int, int, int, Any], int]] = {
            wire.READ: self.read,
            wire.WRITE: self.write,
            wire.ZEROES: self.zero,
            wire.DISCARD: self.trim,
            wire.FLUSH: self.flush,
            wire.STATUS: self.extents,
            wire.CACHE: self.cache,
        }

    # ---- life ----

    def open(self) -> None:
        plugin = self.plugin
        plugin.call_if("preconnect", self.readonly)
        name = self.export or plugin.default_export(self.readonly)
        self.server.export_name = name
        try:
            self.handle = plugin.need("open", self.readonly)
        except Failed:
            self.server.export_name = None
            raise
        try:
            self.ask()
        except Failed:
            self.close()
            raise

    def ask(self) -> None:
        """Asks the plugin what it has, in the order in which nbdkit does."""
        self.size = self._size()
        writable = self.can_write = not self.readonly and self._can("can_write", "pwrite")
        self.can_zero = writable and self._can("can_zero", "zero")
        self.can_fast_zero = writable and self._can_fast_zero()
        self.can_trim = writable and self._can("can_trim", "trim")
        self.can_fua = self._level("can_fua", "flush", FUA_EMULATE) if writable else FUA_NONE
        self.can_flush = self._can("can_flush", "flush")
        self.is_rotational = self._can("is_rotational")
        self.can_multi_conn = self._can("can_multi_conn")
        self.can_cache = self._level("can_cache", "cache", CACHE_NATIVE)
        self.can_extents = self._can("can_extents", "extents")
        self.description = self._description()
        self.minimum, self.preferred, self.maximum = self._block_size()

    def close(self) -> None:
        with contextlib.suppress(Failed):  # it is reported; nbdkit goes on as well
            self.plugin.call_if("close", self.handle)
        self.handle = None
        self.server.export_name = None

    def _size(self) -> int:
        value = self.plugin.need("get_size", self.handle)
        size = as_long(value)
        if size is None:
            raise self.plugin.failed(f"{self.plugin.script}: get_size: not a 64 bit integer: {value!r:.80}")
        if size < 0:
            raise self.plugin.failed(f".get_size function returned invalid value ({size})")
        return size

    def _can(self, name: str, implied_by: str = "") -> bool:
        callback = self.find(name)
        if callback is None:
            return bool(implied_by) and self.find(implied_by) is not None
        return self.call(name, callback, self.handle) is True

    def _can_fast_zero(self) -> bool:
        if self.find("can_fast_zero") is None:
            return not self.can_zero
        return self._can("can_fast_zero")

    def _level(self, name: str, implied_by: str, implied: int) -> int:
        callback = self.find(name)
        if callback is None:
            return implied if self.find(implied_by) is not None else 0
        value = as_int(self.call(name, callback, self.handle))
        if value is None or value < 0:
            raise self.plugin.failed(f"{self.plugin.script}: {name} did not return one of its constants")
        return value

    def _description(self) -> str:
        """Empty where there is none, or not a good one: nobody depends on it."""
        try:
            text = self.plugin.call_if("export_description", self.handle)
        except Failed:
            return ""
        if text is not None and as_text(text) is None:
            self.server.report("export_description method did not return a string")
        return as_text(text) or ""

    def _block_size(self) -> tuple[int, int, int]:
        """Minimum, preferred and maximum; zeros for no constraint."""
        callback = self.find("block_size")
        if callback is None:
            return 0, 0, 0
        value = self.call("block_size", callback, self.handle)
        sizes = list(map(as_long, value)) if isinstance(value, tuple) and len(value) == 3 else [None]
        if None in sizes:
            raise self.plugin.failed(f"{self.plugin.script}: block_size method did not return three integers")
        minimum, preferred, maximum = ((size or 0) & UNLIMITED for size in sizes)
        if wrong := (minimum or preferred or maximum) and _wrong_block_size(minimum, preferred, maximum):
            raise self.plugin.failed(wrong)
        return minimum, preferred, maximum

    # ---- requests ----

    def request(self, op: int, flags: int, length: int, offset: int, memory: Any) -> int:
        """Runs one. memory: the request's slot. Returns 0, a number of extents, or a negative errno."""
        thread = self.server.thread
        thread.error = 0
        try:
            return self.operations[op](length, offset, flags, memory)
        except Failed:
            return -ERRORS.get(thread.error or errno.EIO, errno.EINVAL)

    def read(self, count: int, offset: int, flags: int, memory: Any) -> int:
        self.pread(memory[:count], count, offset)
        return 0

    def _pread_v2(self, view: Any, count: int, offset: int) -> None:
        callback = self.find("pread")
        if callback is None:
            raise self.missing("pread")
        self.call("pread", callback, self.handle, view, offset, 0)

    def _pread_v1(self, view: Any, count: int, offset: int) -> None:
        callback = self.find("pread")
        if callback is None:
            raise self.missing("pread")
        data = self.call("pread", callback, self.handle, count, offset)
        script = self.plugin.script
        try:
            found = memoryview(data).cast("B")
        except (TypeError, ValueError):
            raise self.plugin.failed(
                f"{script}: value returned from pread does not support the buffer protocol"
            ) from None
        if len(found) < count:
            raise self.plugin.failed(f"{script}: buffer returned from pread is too small")
        view[:] = found[:count]

    def write(self, count: int, offset: int, flags: int, memory: Any) -> int:
        native = self.can_fua == FUA_NATIVE
        self.pwrite(memory[:count].toreadonly(), offset, flags & FUA if native else 0)
        if flags & FUA and not native:
            self._flush_after()
        return 0

    def pwrite(self, view: Any, offset: int, flags: int) -> None:
        callback = self.find("pwrite")
        if callback is None:
            raise self.plugin.failed("pwrite not implemented")
        if self.plugin.api == 1:
            self.call("pwrite", callback, self.handle, view, offset)
        else:
            self.call("pwrite", callback, self.handle, view, offset, flags)

    def flush(self, count: int, offset: int, flags: int, memory: Any) -> int:
        if self.can_flush:
            self._flush()
        return 0

    def _flush(self) -> None:
        callback = self.find("flush")
        if callback is None:
            raise self.plugin.failed("flush not implemented")
        if self.plugin.api == 1:
            self.call("flush", callback, self.handle)
        else:
            self.call("flush", callback, self.handle, 0)

    def _flush_after(self) -> None:
        """For FUA that the plugin does not take. nbdkit would refuse it where there is no flush at all."""
        if self.can_fua or self.can_flush:
            self._flush()

    def trim(self, count: int, offset: int, flags: int, memory: Any) -> int:
        if not self.can_trim:
            return 0  # a hint that nothing here can follow
        native = self.can_fua == FUA_NATIVE
        callback = self.find("trim")
        if callback is None:
            raise self.plugin.failed("trim not implemented")
        if self.plugin.api == 1:
            self.call("trim", callback, self.handle, count, offset)
        else:
            self.call("trim", callback, self.handle, count, offset, flags & FUA if native else 0)
        if flags & FUA and not native:
            self._flush_after()
        return 0

    def zero(self, count: int, offset: int, flags: int, memory: Any) -> int:
        native = self.can_fua == FUA_NATIVE
        passed = flags if native else flags & ~FUA
        if flags & FAST_ZERO and not self.can_fast_zero:
            return -errno.EOPNOTSUPP
        if not (self.can_zero and self._zeroed(count, offset, passed)):
            if flags & FAST_ZERO:
                return -errno.EOPNOTSUPP
            self.server.thread.error = 0
            self._write_zeros(count, offset, passed & FUA)
        if flags & FUA and not native:
            self._flush_after()
        return 0

    def _zeroed(self, count: int, offset: int, flags: int) -> bool:
        """Asks the plugin's zero; False when it is missing or says EOPNOTSUPP, by raising or without."""
        callback = self.find("zero")
        if callback is None:
            return False
        last: Any = flags if self.plugin.api > 1 else bool(flags & MAY_TRIM)
        thread = self.server.thread
        try:
            callback(self.handle, count, offset, last)
        except BaseException as error:  # noqa: BLE001 - whatever a callback raises fails it, and is shown
            if thread.error != errno.EOPNOTSUPP:
                raise self.plugin.raised("zero", error) from None
        if thread.error == errno.EOPNOTSUPP:
            self.server.debug("zero requested falling back to pwrite")
            return False
        return True

    def _write_zeros(self, count: int, offset: int, flags: int) -> None:
        most = min(self.maximum or UNLIMITED, ZEROS_MAX)
        zeros = memoryview(bytes(min(count, most)))
        for at in range(0, count, most):
            self.pwrite(zeros[: min(most, count - at)], offset + at, flags)

    def cache(self, count: int, offset: int, flags: int, memory: Any) -> int:
        if self.can_cache == CACHE_EMULATE:
            for at in range(0, count, wire.SLOT_BYTES):
                part = min(wire.SLOT_BYTES, count - at)
                self.pread(memory[:part], part, offset + at)
        elif self.can_cache:
            callback = self.find("cache")
            if callback is None:
                raise self.plugin.failed("cache not implemented")
            self.call("cache", callback, self.handle, count, offset, 0)
        return 0

    def missing(self, name: str) -> Failed:
        return self.plugin.failed(f"{self.plugin.script}: missing callback: {name}")

    # ---- block status ----

    def extents(self, count: int, offset: int, flags: int, memory: Any) -> int:
        """Puts extents into the slot; the first begins at offset, and they do not pass its end."""
        callback = self.find("extents") if self.can_extents else None
        found = Extents(self.plugin, offset, offset + count, self.size)
        if callback is None:
            found.add(offset, count, DATA)
        else:
            self._add_extents(found, self.call("extents", callback, self.handle, count, offset, flags))
        if not found.runs:
            self.server.thread.error = errno.EINVAL
            raise self.plugin.failed("extents: plugin must return at least one extent")
        extents = found.runs[: 1 if flags & wire.REQ_ONE else wire.EXTENTS_MAX]
        for index, (length, kind) in enumerate(extents):
            wire.EXTENT.pack_into(memory, index * wire.EXTENT.size, length, kind)
        return len(extents)

    def _add_extents(self, found: Extents, returned: Any) -> None:
        try:
            items = iter(returned)
        except TypeError:
            raise self.plugin.failed("extents method did not return something which is iterable") from None
        number = 0
        while True:
            try:
                item = next(items)
            except BaseException:  # noqa: BLE001 - nbdkit takes it for the end
                break
            number += 1
            if not isinstance(item, tuple) or len(item) != 3:
                raise self.plugin.failed("extents method did not return an iterable of 3-tuples")
            if not all(isinstance(n, int) and 0 <= n < 1 << 64 for n in item):
                raise self.plugin.failed(
                    f"{self.plugin.script}: PyLong: error: extents are unsigned integers, not {item!r:.80}"
                )
            found.add(*item)
        if not number:
            raise self.plugin.failed("extents method cannot return an empty list")


class Extents:
    """Runs of a range, from its start on: [length, type], neighbours alike merged."""

    def __init__(self, plugin: Plugin, start: int, end: int, size: int) -> None:
        self.plugin = plugin
        self.end = end
        self.size = size  # of the disk: what lies between is checked, too
        self.at = start  # where the next run begins
        self.next = -1  # where the next extent of the plugin has to begin
        self.runs: list[list[int]] = []

    def add(self, offset: int, length: int, kind: int) -> None:
        if self.next >= 0 and self.next != offset:
            raise self.plugin.failed(
                "nbdkit_add_extent: extents must be added in ascending order and must be contiguous"
            )
        self.next = offset + length
        if length == 0 or offset >= self.size or self.next <= self.at:
            return
        if offset > self.at and not self.runs:
            raise self.plugin.failed(f"nbdkit_add_extent: first extent must not be > start ({self.at})")
        stop = min(self.next, self.end)
        if stop <= self.at:
            return
        kind &= 3
        if self.runs and self.runs[-1][1] == kind:
            self.runs[-1][0] += stop - self.at
        else:
            self.runs.append([stop - self.at, kind])
        self.at = stop


def _wrong_block_size(minimum: int, preferred: int, maximum: int) -> str:
    """What is wrong with it, or nothing."""
    if not 1 <= minimum <= MINIMUM_MAX:
        return "plugin must set minimum block size between 1 and 64K"
    if minimum & (minimum - 1):
        return "plugin must set minimum block size to a power of 2"
    if preferred & (preferred - 1):
        return "plugin must set preferred block size to a power of 2"
    if preferred not in PREFERRED:
        return "plugin must set preferred block size between 512 and 32M"
    if maximum != UNLIMITED and maximum % minimum:
        return "plugin must set maximum block size to -1 or a multiple of minimum block size"
    if not minimum <= preferred <= maximum:
        return "plugin must set minimum block size <= preferred <= maximum"
    return ""
