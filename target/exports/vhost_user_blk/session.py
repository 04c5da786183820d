# SPDX-License-Identifier: Apache-2.0
"""What each message means: the state of one front end's connection. No I/O on the connection itself.

A queue runs when it has been started (by its kick descriptor), is enabled, and has not been stopped by
GET_VRING_BASE. What changes under a running queue, such as the memory, changes while all queues are stopped
for a moment; requests in flight are waited for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.backend import MAX_REGIONS, Backend
from target.exports.vhost_user_blk.device import BlockDevice, Feature
from target.exports.vhost_user_blk.messages import (
    MAX_CONFIG,
    Config,
    MemoryRegion,
    MessageError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringDescriptor,
    VringState,
)

log = logging.getLogger(__name__)

OFFERED = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


@dataclass(slots=True)
class Queue:
    started: bool = False
    enabled: bool = False

    @property
    def wanted(self) -> bool:
        return self.started and self.enabled


class Refused(Exception):
    """A request that is well formed and cannot be done: a negative answer, where one was asked for."""


class Session:
    """flush makes all earlier writes durable, for the switch to write-through."""

    def __init__(self, device: BlockDevice, backend: Backend, flush: Callable[[], Awaitable[None]]) -> None:
        self.device = device
        self.backend = backend
        self.flush = flush
        self.queues = [Queue() for _ in range(device.queues)]
        self.protocol = ProtocolFeature(0)
        self.channel: socket.socket | None = None
        self._lock = asyncio.Lock()  # one message, or one change from our side, at a time
        self._drained = False
        self._closed = False
        self._restoring: asyncio.Future[None] | None = None
        self._handlers: dict[Request, Callable[[Any, list[int]], Awaitable[bytes | None]]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.SET_BACKEND_REQ_FD: self._set_channel,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
        }

    async def handle(self, number: int, need_reply: bool, payload: bytes, fds: list[int]) -> bytes | None:
        """The bytes to answer with, if any. MessageError ends the session. The caller closes fds."""
        acknowledge = need_reply and ProtocolFeature.REPLY_ACK in self.protocol
        try:
            request = Request(number)
        except ValueError:
            if acknowledge:
                return messages.reply_u64(number, 1)
            raise MessageError(f"request {number} is not known") from None
        value = messages.parse(request, payload, len(fds))
        async with self._lock:
            return await self._do(request, value, fds, acknowledge)

    async def _do(self, request: Request, value: Any, fds: list[int], acknowledge: bool) -> bytes | None:
        if messages.FORMS[request].replies:
            return await self._handlers[request](value, fds)
        try:
            await self._handlers[request](value, fds)
        except (Refused, OSError) as error:
            if not acknowledge:
                raise MessageError(f"{request.name}: {_reason(error)}") from None
            return messages.reply_u64(request, 1)
        return messages.reply_u64(request, 0) if acknowledge else None

    async def close(self) -> None:
        """Drains and releases all."""
        self._closed = True  # no queue starts any more
        if self._drained:
            self._end_drain()
        async with self._lock:
            if self.channel is not None:
                self.channel.close()
                self.channel = None
            await self.backend.close()

    # ---- changes from our side, which the front end does not notice ----

    async def drain(self, deadline: float) -> None:
        """Returns when no queue runs, until ``undrain`` or ``close``. TimeoutError: they go on as before."""
        await self._halt(deadline)
        self._drained = True
        if self._closed:  # its end has begun meanwhile, and waits for the lock
            self._end_drain()

    def undrain(self) -> None:
        """The queues that should run do again. OSError."""
        if not self._drained:
            return
        try:
            self._start_all()
        finally:
            self._end_drain()

    def _end_drain(self) -> None:
        self._drained = False
        self._lock.release()

    async def move(self, threads: list[int], deadline: float) -> None:
        """Queues go on on other I/O threads. TimeoutError: on the same, as before. OSError."""
        await self._halt(deadline)
        try:
            self.backend.threads = threads
            self._start_all()
        finally:
            self._lock.release()

    async def _halt(self, deadline: float) -> None:
        """Takes the lock, and stops all queues.

        When it fails they go on, and the lock is free, some time later: a thread may hang in a system call.
        """
        async with asyncio.timeout(deadline):
            await self._lock.acquire()
            running = sorted(self.backend.running)
            try:
                await asyncio.gather(*(self.backend.stop(index) for index in running))
            except BaseException:
                self._restoring = asyncio.ensure_future(self._go_on(running))
                raise

    async def _go_on(self, halted: list[int]) -> None:
        try:
            for index in halted:
                await self.backend.give_up_stop(index)
            self._start_all()
        except OSError as error:
            log.error("a queue cannot go on: %s", error.strerror)
        finally:
            self._lock.release()

    def resized(self) -> None:
        """The device has a new capacity: the front end is told, if it wants to be."""
        self.backend.set_capacity(self.device.capacity)
        if self.channel is None or ProtocolFeature.CONFIG not in self.protocol:
            return
        try:
            self.channel.send(messages.config_changed())
        except OSError:  # full, or closed by the front end, which then does without
            self.channel.close()
            self.channel = None

    # ---- features and configuration ----

    async def _get_features(self, _: None, fds: list[int]) -> bytes:
        return messages.reply_u64(Request.GET_FEATURES, self.device.offered)

    async def _set_features(self, features: int, fds: list[int]) -> None:
        try:
            self.device.take(features)
        except ValueError as error:
            raise MessageError(f"SET_FEATURES: {error}") from None
        async with self._stopped():
            self.backend.set_features(features)
            self.backend.set_write_through(not self.device.writeback)
            if Feature.PROTOCOL_FEATURES not in self.device.taken:
                for queue in self.queues:
                    queue.enabled = True

    async def _get_protocol_features(self, _: None, fds: list[int]) -> bytes:
        return messages.reply_u64(Request.GET_PROTOCOL_FEATURES, OFFERED)

    async def _set_protocol_features(self, features: int, fds: list[int]) -> None:
        if features & ~OFFERED:
            raise MessageError(f"SET_PROTOCOL_FEATURES: {features & ~OFFERED:#x} were not offered")
        self.protocol = ProtocolFeature(features)

    async def _set_owner(self, _: None, fds: list[int]) -> None:
        """Nothing follows from it: a connection has one owner."""

    async def _reset_owner(self, _: None, fds: list[int]) -> None:
        """Deprecated; the specification lets it disable all rings."""
        for index, queue in enumerate(self.queues):
            queue.enabled = False
            await self._update(index)

    async def _get_queue_num(self, _: None, fds: list[int]) -> bytes:
        return messages.reply_u64(Request.GET_QUEUE_NUM, self.device.queues)

    async def _get_config(self, wanted: Config, fds: list[int]) -> bytes:
        data = self.device.read_config(wanted.offset, wanted.size, MAX_CONFIG)
        if data is None:
            return messages.reply_config(Request.GET_CONFIG, Config(wanted.offset, 0, wanted.flags, b""))
        return messages.reply_config(Request.GET_CONFIG, wanted._replace(data=data))

    async def _set_config(self, written: Config, fds: list[int]) -> None:
        before = self.device.writeback
        if not self.device.write_config(written.offset, written.data):
            raise Refused(f"offset {written.offset} is not writable in this way")
        self.backend.set_write_through(not self.device.writeback)
        if before and not self.device.writeback:
            await self.flush()

    async def _set_channel(self, _: None, fds: list[int]) -> None:
        if ProtocolFeature.BACKEND_REQ not in self.protocol:
            raise Refused("the protocol feature was not taken")
        if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise Refused("the file descriptor is no socket")
        if self.channel is not None:
            self.channel.close()
        self.channel = socket.socket(fileno=fds.pop())
        self.channel.setblocking(False)

    # ---- memory ----

    async def _get_max_mem_slots(self, _: None, fds: list[int]) -> bytes:
        return messages.reply_u64(Request.GET_MAX_MEM_SLOTS, MAX_REGIONS)

    async def _set_mem_table(self, regions: list[MemoryRegion], fds: list[int]) -> None:
        async with self._stopped():
            self.backend.clear_regions()
            for region, fd in zip(regions, fds, strict=True):
                self.backend.add_region(region, fd)

    async def _add_mem_reg(self, region: MemoryRegion, fds: list[int]) -> None:
        self._need_slots()
        async with self._stopped():
            self.backend.add_region(region, fds[0])

    async def _rem_mem_reg(self, region: MemoryRegion, fds: list[int]) -> None:
        self._need_slots()
        async with self._stopped():
            self.backend.remove_region(region)

    def _need_slots(self) -> None:
        if ProtocolFeature.CONFIGURE_MEM_SLOTS not in self.protocol:
            raise Refused("the protocol feature was not taken")

    # ---- queues ----

    async def _set_vring_num(self, state: VringState, fds: list[int]) -> None:
        self.backend.set_size(state.queue, state.num)

    async def _set_vring_addr(self, address: VringAddress, fds: list[int]) -> None:
        if address.flags:
            raise Refused("logging was not offered")
        self.backend.set_addresses(address)

    async def _set_vring_base(self, state: VringState, fds: list[int]) -> None:
        self.backend.set_base(state.queue, state.num)

    async def _get_vring_base(self, state: VringState, fds: list[int]) -> bytes:
        queue = self._queue(state.queue)
        queue.started = False
        await self._update(state.queue)
        self.backend.set_kick(state.queue, -1)
        answer = VringState(state.queue, self.backend.base(state.queue))
        return messages.reply(Request.GET_VRING_BASE, messages.VRING_STATE.pack(*answer))

    async def _set_vring_kick(self, vring: VringDescriptor, fds: list[int]) -> None:
        queue = self._queue(vring.queue)
        queue.started = False
        await self._update(vring.queue)
        self.backend.set_kick(vring.queue, fds[0] if vring.has_fd else -1)
        queue.started = True
        await self._update(vring.queue)

    async def _set_vring_call(self, vring: VringDescriptor, fds: list[int]) -> None:
        self.backend.set_call(vring.queue, fds[0] if vring.has_fd else -1)

    async def _set_vring_err(self, vring: VringDescriptor, fds: list[int]) -> None:
        queue = self._queue(vring.queue)
        started, queue.started = queue.started, False
        await self._update(vring.queue)
        self.backend.set_error(vring.queue, fds[0] if vring.has_fd else -1)
        queue.started = started
        await self._update(vring.queue)

    async def _set_vring_enable(self, state: VringState, fds: list[int]) -> None:
        if state.num > 1:
            raise Refused(f"{state.num} is neither 0 nor 1")
        self._queue(state.queue).enabled = bool(state.num)
        await self._update(state.queue)

    def _queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise MessageError(f"queue {index} of {len(self.queues)}")
        return self.queues[index]

    async def _update(self, index: int) -> None:
        """Starts or stops the queue as its state asks for."""
        wanted, runs = self.queues[index].wanted, index in self.backend.running
        if runs and not wanted:
            await self.backend.stop(index)
        elif wanted and not runs:
            self.backend.start(index)

    @asynccontextmanager
    async def _stopped(self) -> AsyncIterator[None]:
        """No queue runs inside; afterwards those that should do again."""
        for index in sorted(self.backend.running):
            await self.backend.stop(index)
        try:
            yield
        finally:
            for index in range(len(self.queues)):
                await self._update(index)

    def _start_all(self) -> None:
        """Those that should run."""
        if self._closed:
            return
        for index, queue in enumerate(self.queues):
            if queue.wanted and index not in self.backend.running:
                self.backend.start(index)


def _reason(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
