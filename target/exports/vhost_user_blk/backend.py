# SPDX-License-Identifier: Apache-2.0
"""The datapath's half of a session: memory and queues that live in C. Methods raise OSError."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from typing import Any

from target.datapath import Datapath, Gate, Op, check, ffi, lib
from target.exports.vhost_user_blk.messages import MemoryRegion, VringAddress

MEMORY_LOST: int = lib.BT_VHOST_MEMORY_LOST
TROUBLE: dict[int, str] = {
    lib.BT_VHOST_BAD_INDEX: "the available index makes no sense",
    lib.BT_VHOST_BAD_CHAIN: "a descriptor chain is malformed",
    lib.BT_VHOST_BAD_ADDRESS: "a buffer lies outside of the guest's memory",
    lib.BT_VHOST_TOO_MANY: "more requests are in flight than the ring holds",
    lib.BT_VHOST_MEMORY_LOST: "the front end truncated the memory it shares",
    lib.BT_VHOST_BAD_DESCRIPTOR: "its kick or call file descriptor does not work as one",
}
MAX_QUEUES: int = lib.BT_VHOST_MAX_QUEUES
MAX_REGIONS: int = lib.BT_VHOST_MAX_REGIONS
SERIAL_BYTES: int = lib.BT_VHOST_SERIAL

# Seconds: how often it is looked whether a thread is blocked in a notification, and for how long it may be.
WATCH = 0.25

OnTrouble = Callable[[int, int], None]
"""Called with the queue's index and a key of TROUBLE."""


class Backend:
    """Owns the C session; ``close`` stops what runs and gives all back."""

    def __init__(
        self,
        datapath: Datapath,
        gate: Gate,
        threads: Sequence[int],
        *,
        queues: int,
        capacity: int,
        block_size: int,
        writable: bool,
        serial: bytes,
        on_trouble: OnTrouble,
    ) -> None:
        self._datapath = datapath
        self.threads = threads  # of queues that start from here on
        self._on_trouble = on_trouble
        self._tag = datapath.session(self._event)
        self._stops: dict[int, asyncio.Future[int]] = {}
        self.running: set[int] = set()
        self._c = lib.bt_vhost_new(
            datapath.dp,
            self._tag,
            gate.ptr,
            queues,
            capacity,
            block_size,
            writable,
            serial.ljust(SERIAL_BYTES, b"\0"),
        )
        if self._c == ffi.NULL:
            datapath.end_session(self._tag)
            check(-ffi.errno)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(WATCH, self._watch)

    def _watch(self) -> None:
        lib.bt_vhost_interrupt(self._c, int(WATCH * 1e9))
        self._timer = self._loop.call_later(WATCH, self._watch)

    def _event(self, result: int) -> None:
        self._on_trouble(result >> 8, result & 0xFF)

    async def close(self) -> None:
        """Drains all queues. The object cannot be used afterwards."""
        for queue in sorted(self.running):
            self._begin_stop(queue)
        for queue in sorted(self.running):
            await self.stop(queue)
        self._timer.cancel()
        self._datapath.end_session(self._tag)
        lib.bt_vhost_free(self._c)
        self._c = ffi.NULL

    def set_capacity(self, capacity: int) -> None:
        lib.bt_vhost_set_capacity(self._c, capacity)

    def set_features(self, features: int) -> None:
        check(lib.bt_vhost_set_features(self._c, features))

    def set_write_through(self, on: bool) -> None:
        lib.bt_vhost_set_write_through(self._c, on)

    # memory, while no queue runs

    def clear_regions(self) -> None:
        check(lib.bt_vhost_clear_regions(self._c))

    def add_region(self, region: MemoryRegion, fd: int) -> None:
        check(lib.bt_vhost_add_region(self._c, ffi.new("struct bt_vhost_region *", list(region)), fd))

    def remove_region(self, region: MemoryRegion) -> None:
        check(lib.bt_vhost_remove_region(self._c, ffi.new("struct bt_vhost_region *", list(region))))

    # queues; all but set_call while the queue does not run

    def set_size(self, queue: int, size: int) -> None:
        check(lib.bt_vhost_queue_set_size(self._c, queue, size))

    def set_base(self, queue: int, base: int) -> None:
        check(lib.bt_vhost_queue_set_base(self._c, queue, base))

    def set_addresses(self, address: VringAddress) -> None:
        check(
            lib.bt_vhost_queue_set_addresses(
                self._c, address.queue, address.descriptor, address.available, address.used
            )
        )

    def set_kick(self, queue: int, fd: int) -> None:
        check(lib.bt_vhost_queue_set_kick(self._c, queue, fd))

    def set_call(self, queue: int, fd: int) -> None:
        check(lib.bt_vhost_queue_set_call(self._c, queue, fd))

    def set_error(self, queue: int, fd: int) -> None:
        check(lib.bt_vhost_queue_set_error(self._c, queue, fd))

    def base(self, queue: int) -> int:
        """The index of the next available entry to take."""
        return int(lib.bt_vhost_queue_base(self._c, queue))

    def start(self, queue: int) -> None:
        check(lib.bt_vhost_queue_start(self._c, queue, self.threads[queue % len(self.threads)]))
        self.running.add(queue)

    async def stop(self, queue: int) -> None:
        """Returns when nothing of the queue is in flight. May be cancelled, and called again or given up."""
        done = self._begin_stop(queue)
        await asyncio.shield(done)
        if self._stops.get(queue) is done:
            self._has_stopped(queue)

    async def give_up_stop(self, queue: int) -> None:
        """After a stop that was cancelled: the queue goes on as before."""
        if queue not in self._stops:
            return
        cookie, done = self._datapath.cookie()
        lib.bt_vhost_queue_unstop(self._c, queue, cookie)
        await asyncio.shield(done)
        if self._stops[queue].result() == -errno.ECANCELED:
            del self._stops[queue]
        else:
            self._has_stopped(queue)
            self.start(queue)

    def _has_stopped(self, queue: int) -> None:
        del self._stops[queue]
        lib.bt_vhost_queue_stopped(self._c, queue)
        self.running.discard(queue)

    def _begin_stop(self, queue: int) -> asyncio.Future[int]:
        done = self._stops.get(queue)
        if done is None:
            cookie, done = self._datapath.cookie()
            self._stops[queue] = done
            check(lib.bt_vhost_queue_stop(self._c, queue, cookie))
        return done

    def counters(self) -> dict[str, Any]:
        """Of all queues together, by operation where that applies."""
        raw = ffi.new("struct bt_vhost_counters *")
        lib.bt_vhost_get_counters(self._c, raw)
        return {
            "requests": {op.name.lower(): raw.requests[op] for op in Op if raw.requests[op]},
            "bytes": {op.name.lower(): raw.bytes[op] for op in Op if raw.bytes[op]},
            **{name: getattr(raw, name) for name in ("other", "failed", "kicks", "notifications")},
        }
