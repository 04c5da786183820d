# SPDX-License-Identifier: Apache-2.0
"""The node: how it opens, and what happens when a connection is lost. Requests never come here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Sequence
from typing import Any

from target.datapath import Object
from target.datapath import ffi as core_ffi
from target.datapath import lib as core_lib
from target.drivers.protocol.iscsi import options as checked
from target.drivers.protocol.iscsi.link import AVAILABLE, Connector, Link, LinkError, Login, Lun, ffi, lib
from target.drivers.protocol.iscsi.options import IscsiOptions, OptionProblem
from target.graph.errors import BlockError
from target.graph.node import Node
from target.objects import secret

log = logging.getLogger("blocktarget")

INITIATOR = "iqn.2008-11.org.linux-kvm"  # QEMU's, so that access lists need no change
PERSISTENT_RESERVE_OUT = 0x5F  # SPC-4 6.16
CONNECT_SECONDS = 10.0
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
STEADY_SECONDS = 10.0  # a connection that held so long was a good one
BREAKS_ALLOWED = 2  # of others in a row, before it is tried more slowly


class Session:
    """One of the node's connections: whether there is one, and the task that makes the next."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.up = True
        self.since = 0.0
        self.breaks = 0  # connections in a row that did not hold
        self.task: asyncio.Task[None] | None = None


class Iscsi(Node, driver="iscsi"):
    """A LUN, served by I/O threads over one or more sessions."""

    is_protocol = True
    Options = IscsiOptions
    options: IscsiOptions
    connector: Connector | None = None
    inner: Object | None = None
    event_tag: int | None = None
    lun: Lun
    sessions: Sequence[Session] = ()
    closing = False

    async def open(self) -> None:
        if not AVAILABLE:
            raise self.error("driver 'iscsi': this build lacks libiscsi")
        try:
            checked.check(self.options)
        except OptionProblem as problem:
            raise self.error(str(problem)) from None
        if self.settings.force_share and not self.read_only:
            raise self.error("force-share=on can only be used with read-only images")
        self.links: list[Link] = []
        self.sessions = [Session(index) for index in range(self.options.sessions)]
        self.connector = Connector(self._login(), self.options.sessions)
        for session in self.sessions:
            self.links.append(await self._first_link(session.index))
        self.lun = self.links[0].lun
        self._check_write_protection()

    def interrupt(self) -> None:
        """Requests do not wait for a connection from here on."""
        self.closing = True
        for session in self.sessions:
            if not session.up:
                self._give_up(session)

    async def close(self) -> None:
        self.closing = True
        try:
            if self.inner is not None:
                await self._close_device(self.inner)
        finally:
            if self.connector is not None:
                for link in self.links:
                    link.close()
                self.connector.close()
                self.connector = None

    def make_object(self) -> Object:
        self.event_tag = self.datapath.session(self._on_event)
        self.inner = self.datapath.adopt(self._new_device)
        now = asyncio.get_running_loop().time()
        for session, link in zip(self.sessions, self.links, strict=True):
            session.since = now
            lib.bt_iscsi_attach(self._device, session.index, link.take())
        return self.datapath.align(self.inner, self.lun.block_size)

    @property
    def storage(self) -> object | None:
        return ("iscsi", self.options.portal, self.options.target, self.options.lun)

    async def truncate(self, size: int) -> None:
        raise self.error("Cannot resize iSCSI devices" if size <= self.size else "Cannot grow iSCSI devices")

    def counters(self) -> dict[str, Any]:
        assert self.inner is not None
        raw = ffi.new("struct bt_iscsi_counters *")
        lib.bt_iscsi_counters(self._device, raw)
        names = ("connections", "resent", "retried", "unit_attentions", "timeouts", "copied")
        return self.inner.counters() | {"iscsi": {name: getattr(raw, name) for name in names}}

    async def scsi_command(
        self, cdb: bytes, data_out: bytes | None = None, data_in_length: int = 0
    ) -> tuple[int, bytes, bytes]:
        """Sends a command to the LUN, over session 0. Returns its SAM status, sense data and what it read.

        OSError when there is no answer: then it is not known whether it was done.
        """
        if not 6 <= len(cdb) <= 16 or (data_out and data_in_length):
            raise ValueError("a CDB has 6 to 16 bytes, and data go one way")
        if cdb[0] == PERSISTENT_RESERVE_OUT and len(self.sessions) > 1:
            what = "each session would have to register by itself: persistent reservations need sessions=1"
            raise OSError(errno.EOPNOTSUPP, f"{self.label}: {what}")
        command = ffi.new("struct bt_iscsi_command *")
        out, into = ffi.new("char[]", data_out or b""), ffi.new("unsigned char[]", max(data_in_length, 1))
        command.cdb, command.cdb_length = cdb.ljust(16, b"\0"), len(cdb)
        command.data_out, command.data_out_length = out, len(data_out or b"")
        command.data_in, command.data_in_length = into, data_in_length
        cookie, future = self.datapath.cookie()
        self.datapath.keep(cookie, (command, out, into))
        lib.bt_iscsi_command(self._device, command, cookie)
        result = await future
        if result < 0:
            raise OSError(-result, f"{self.label}: {os.strerror(-result)}")
        sense = bytes(ffi.buffer(command.sense, command.sense_length))
        return command.status, sense, bytes(ffi.buffer(into, command.data_in_length))

    # ---- opening ----

    def _login(self) -> Login:
        options = self.options
        return Login(
            initiator=options.initiator_name or INITIATOR,
            portal=options.portal,
            target=options.target,
            lun=options.lun,
            header_digest=options.header_digest,
            data_digest=options.data_digest,
            user=options.user,
            password=self._password("password-secret", options.password_secret),
            mutual_user=options.mutual_user,
            mutual_password=self._password("mutual-password-secret", options.mutual_password_secret),
            isid=secrets.randbits(24),
        )

    def _password(self, option: str, id: str | None) -> bytes | None:
        if id is None:
            return None
        try:
            value = secret(self.graph.objects, id)
        except BlockError as error:
            raise self.error(f"option '{option}': {error}") from None
        if not value or b"\0" in value or len(value) > checked.STRING_MAX:
            raise self.error(
                f"option '{option}': a password has 1 to {checked.STRING_MAX} bytes and none of them null"
            )
        return value

    async def _first_link(self, session: int) -> Link:
        assert self.connector is not None
        seconds = min(self.options.timeout or CONNECT_SECONDS, CONNECT_SECONDS)
        try:
            return await self.connector.connect(session, seconds)
        except LinkError as error:
            where = f"'{self.options.target}' at '{self.options.portal}'"
            raise self.error(
                f"iSCSI: Failed to connect to LUN {self.options.lun} of {where}: {error}"
            ) from None

    def _check_write_protection(self) -> None:
        if not self.lun.flags & lib.BT_ISCSI_READ_ONLY or self.read_only:
            return
        if not self.settings.auto_read_only:
            raise self.error("LUN is write protected")
        self.read_only = True

    def _new_device(self, tag: int) -> Any:
        place = ffi.new("char[]", f"{self.options.portal} {self.options.target}".encode())
        settings = ffi.new("struct bt_iscsi_settings *")
        settings.lun = self.options.lun
        settings.sessions = self.options.sessions
        settings.timeout = self.options.timeout
        settings.no_flush = self.settings.no_flush
        settings.place = place
        made = lib.bt_iscsi_new(
            _address(core_lib.bt_device_api()),
            _address(self.datapath.dp),
            tag,
            self.event_tag,
            settings,
            self.lun.raw,
        )
        return core_ffi.cast("bt_object *", int(ffi.cast("uintptr_t", made)))

    @property
    def _device(self) -> Any:
        assert self.inner is not None
        return _address(self.inner.ptr)

    # ---- closing ----

    async def _close_device(self, device: Object) -> None:
        self.interrupt()
        try:
            if self.opened and not self.read_only and self._has_written():
                await self.flush()
        except OSError as error:
            raise BlockError.from_os(f"{self.label}: Could not flush at the end", error) from None
        finally:
            for session in self.sessions:
                await self._stop(session)
            cookie, future = self.datapath.cookie()
            lib.bt_iscsi_close(self._device, cookie)
            await future
            assert self.event_tag is not None
            self.datapath.end_session(self.event_tag)
            device.release()
            self.inner = None

    def _has_written(self) -> bool:
        assert self.inner is not None
        requests = self.inner.counters()["requests"]
        return any(requests[op] for op in ("write", "zeroes", "discard"))

    @staticmethod
    async def _stop(session: Session) -> None:
        if session.task is not None:
            session.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await session.task

    # ---- what the datapath says ----

    def _on_event(self, result: int) -> None:
        session, event = self.sessions[result >> 8], result & 0xFF
        if event == lib.BT_ISCSI_LOST:
            self._on_loss(session)
        elif event == lib.BT_ISCSI_RESIZED:
            self._on_new_size()
        elif event == lib.BT_ISCSI_CHANGED:
            log.error(
                "%s: the LUN has another block size now: requests fail until it is reopened", self.label
            )

    def _on_new_size(self) -> None:
        assert self.inner is not None
        size = self.inner.size
        if self.object.size != size:
            log.warning("%s: the LUN has %d bytes now, not %d", self.label, size, self.object.size)
            self.object.size = size
            self.resized()

    def _on_loss(self, session: Session) -> None:
        session.up = False
        if self.closing:
            self._give_up(session)
            return
        reason = ffi.new("char[]", 256)
        lib.bt_iscsi_reason(self._device, session.index, reason, len(reason))
        text = ffi.string(reason).decode(errors="replace").strip()
        log.warning("%s: lost the connection to '%s': %s", self.label, self.options.portal, text)
        loop = asyncio.get_running_loop()
        session.breaks = 0 if loop.time() - session.since > STEADY_SECONDS else session.breaks + 1
        session.task = loop.create_task(self._reconnect(session))

    def _give_up(self, session: Session) -> None:
        lib.bt_iscsi_give_up(self._device, session.index)

    async def _reconnect(self, session: Session) -> None:
        """Until there is a connection. Requests wait for it so long as reconnect-delay says."""
        loop = asyncio.get_running_loop()
        delay = self.options.reconnect_delay
        timer = loop.call_later(delay, self._out_of_patience, session)
        begun = loop.time()
        try:
            link = await self._next_link(session)
            session.since = loop.time()
            session.up = True
            lib.bt_iscsi_attach(self._device, session.index, link.take())
        finally:
            timer.cancel()
        log.warning(
            "%s: connected to '%s' again after %.1f s", self.label, self.options.portal, loop.time() - begun
        )

    def _out_of_patience(self, session: Session) -> None:
        log.error(
            "%s: no connection to '%s' for %d s: requests fail until there is one",
            self.label,
            self.options.portal,
            self.options.reconnect_delay,
        )
        self._give_up(session)

    async def _next_link(self, session: Session) -> Link:
        said = ""
        failures = max(0, session.breaks - BREAKS_ALLOWED)
        while True:
            if failures:
                await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1])
            try:
                return await self._same_lun(session)
            except LinkError as error:
                failures += 1
                if str(error) != said:
                    said = str(error)
                    log.info("%s: no connection to '%s': %s", self.label, self.options.portal, said)

    async def _same_lun(self, session: Session) -> Link:
        assert self.connector is not None
        link = await self.connector.connect(session.index, CONNECT_SECONDS)
        if not link.lun.is_other(self.lun):
            return link
        link.close()
        raise LinkError("it is not the LUN that was there before")


def _address(pointer: Any) -> Any:
    """A pointer of the core for the extension, whose types are its own."""
    return ffi.cast("void *", int(core_ffi.cast("uintptr_t", pointer)))
