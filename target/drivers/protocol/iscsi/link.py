# SPDX-License-Identifier: Apache-2.0
"""Links: connections that are made, logged in and asked about their LUN, on threads that may wait."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from target.drivers.protocol.iscsi.options import numeric, parse_portal

try:
    from target.datapath._iscsi import ffi, lib
except ImportError:
    ffi = lib = None

AVAILABLE = lib is not None
DIGESTS = {"none": 0, "none-crc32c": 1, "crc32c-none": 2, "crc32c": 3}


__all__ = ["AVAILABLE", "Connector", "Link", "LinkError", "Login", "Lun", "ffi", "lib"]


class LinkError(Exception):
    """Why there is no connection, in one line."""


@dataclass
class Login:
    """What it takes to log in. Texts, ready for C."""

    initiator: str
    portal: str
    target: str
    lun: int
    header_digest: str
    data_digest: str
    user: str | None = None
    password: bytes | None = None
    mutual_user: str | None = None
    mutual_password: bytes | None = None
    isid: int = 0
    """24 random bits, the same as long as the node lives: by them the target knows a session that comes back,
    whose persistent reservations are still its own."""


@dataclass(frozen=True)
class Lun:
    """What the LUN says about itself."""

    blocks: int
    block_size: int
    flags: int
    name: bytes
    """its best designator, with its type before it; empty when it has none"""
    model: str
    raw: Any = None

    def is_other(self, before: Lun) -> bool:
        """Whether this cannot be the LUN that was there before."""
        return self.block_size != before.block_size or self.name != before.name or self.model != before.model


def _lun(raw: Any) -> Lun:
    designator = bytes(ffi.buffer(raw.designator))
    texts = [ffi.string(text).decode("ascii") for text in (raw.vendor, raw.product)]
    return Lun(raw.blocks, raw.block_size, raw.flags, designator.rstrip(b"\0"), " ".join(texts), raw)


def _free(pointer: Any, kept: list[Any], _: Future[Any]) -> None:
    """At last C has returned, and needs what was kept for it no more."""
    lib.bt_iscsi_link_free(pointer)


class Link:
    """A connection with its LUN, until a session takes it (``take``) or it is closed."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        raw = ffi.new("struct bt_iscsi_lun *")
        lib.bt_iscsi_link_lun(pointer, raw)
        self.lun = _lun(raw)

    def take(self) -> Any:
        pointer, self._pointer = self._pointer, None
        assert pointer is not None
        return pointer

    def close(self) -> None:
        if self._pointer is not None:
            lib.bt_iscsi_link_free(self.take())


class Connector:
    """Makes links, each on a thread of its own: a target that does not answer holds up nothing else."""

    def __init__(self, login: Login, threads: int) -> None:
        self.login = login
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bt-iscsi")

    def close(self) -> None:
        """No new links. What waits has been cancelled before."""
        self._pool.shutdown(wait=False)

    async def connect(self, session: int, seconds: float) -> Link:
        """A new link to the portal. LinkError says why there is none, after so many seconds at most."""
        end = asyncio.get_running_loop().time() + seconds
        try:
            addresses = await asyncio.wait_for(self._resolve(), seconds)
        except TimeoutError:
            raise LinkError(f"'{self.login.portal}' was not resolved within {seconds:g} s") from None
        except (OSError, UnicodeError) as error:
            raise LinkError(f"'{self.login.portal}' cannot be resolved: {error}") from None
        failure: LinkError | None = None
        for address in addresses:
            left = end - asyncio.get_running_loop().time()
            try:
                return await self._open(session, address, max(left, 0.1))
            except LinkError as error:
                failure = failure or error
        raise failure or LinkError(f"'{self.login.portal}' has no address")

    async def _resolve(self) -> list[str]:
        host, port = parse_portal(self.login.portal)
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, ask)
        return list(dict.fromkeys(numeric(str(address[0]), port) for *_, address in found))

    async def _open(self, session: int, address: str, seconds: float) -> Link:
        pointer = lib.bt_iscsi_link_new()
        if pointer == ffi.NULL:
            raise LinkError("no memory or descriptor for a connection")
        options, kept = self._options(session, address)
        work = self._pool.submit(lib.bt_iscsi_link_open, pointer, options, int(seconds * 1000))
        try:
            result = await asyncio.shield(asyncio.wrap_future(work))
        except BaseException:
            lib.bt_iscsi_link_cancel(pointer)
            work.add_done_callback(partial(_free, pointer, kept))
            raise
        if result < 0:
            text = ffi.string(lib.bt_iscsi_link_error(pointer)).decode(errors="replace").strip()
            lib.bt_iscsi_link_free(pointer)
            raise LinkError(text)
        return Link(pointer)

    def _options(self, session: int, address: str) -> tuple[Any, list[Any]]:
        login = self.login
        kept: list[Any] = []

        def text(value: str | bytes | None) -> Any:
            if value is None:
                return ffi.NULL
            kept.append(ffi.new("char[]", value.encode() if isinstance(value, str) else value))
            return kept[-1]

        options = ffi.new("struct bt_iscsi_options *")
        options.initiator = text(login.initiator)
        options.portal = text(address)
        options.target = text(login.target)
        options.user, options.password = text(login.user), text(login.password)
        options.mutual_user, options.mutual_password = text(login.mutual_user), text(login.mutual_password)
        options.lun = login.lun
        options.header_digest = DIGESTS[login.header_digest]
        options.data_digest = DIGESTS[login.data_digest]
        options.isid = login.isid
        options.isid_qualifier = session
        return options, kept
