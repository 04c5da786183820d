# SPDX-License-Identifier: Apache-2.0
"""Between an initiator and a target: reads each PDU that passes, checks its digests, and may damage one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from target.peers.iscsi_target import pdu
from target.peers.iscsi_target.pdu import BHS_SIZE, Opcode

FULL_FEATURE = 0x83  # T, and as the next stage the full feature phase (RFC 7143 section 11.13)


@dataclass
class _Connection:
    """What its login has agreed on."""

    ends: tuple[socket.socket, socket.socket]
    full_feature: bool = False
    header_digest: bool = False
    data_digest: bool = False
    offered: set[str] = field(default_factory=set)


class Wire:
    """A relay to ``target_port`` on loopback; its own port is ``port``."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.problems: list[str] = []
        self.digests: Counter[tuple[str, int]] = Counter()
        """of header or data, and the opcode"""
        self.offered: set[str] = set()
        """values of DataDigest in login requests"""
        self.damage_data_in = 0
        """the so-manieth Data-In with data from here on has one bit of its data changed; 0: none"""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            self._end(connection)
        for thread in self._threads:
            thread.join(10)

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _spawn(self, function: object, *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target_port))
                connection = _Connection((near, far))
                self._connections.append(connection)
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._spawn(self._relay, connection, source, sink)

    def _relay(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                sink.sendall(self._one(connection, source))
        self._end(connection)

    @staticmethod
    def _end(connection: _Connection) -> None:
        for end in connection.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _one(self, connection: _Connection, source: socket.socket) -> bytes:
        """One PDU as it came."""
        header = _exactly(source, BHS_SIZE)
        full = connection.full_feature
        raw = bytearray(header)
        if full and connection.header_digest:
            raw += self._digest("header", header, header, source)
        length = int.from_bytes(header[5:8], "big")
        data = _exactly(source, length + -length % 4)
        raw += data
        if full and connection.data_digest and length:
            raw += self._digest("data", header, data, source)
        self._look(connection, header, data[:length])
        return self._damaged(header, raw, BHS_SIZE + 4 * (full and connection.header_digest))

    def _digest(self, kind: str, header: bytes, covered: bytes, source: socket.socket) -> bytes:
        digest = _exactly(source, pdu.DIGEST_SIZE)
        with self._lock:
            self.digests[kind, header[0] & 0x3F] += 1
            if digest != pdu.digest(covered):
                self.problems.append(f"wrong {kind} digest of PDU {header[0]:#x}")
        return digest

    def _look(self, connection: _Connection, header: bytes, data: bytes) -> None:
        opcode = header[0] & 0x3F
        if opcode not in (Opcode.LOGIN, Opcode.LOGIN_RESPONSE):
            return
        keys = pdu.decode_text(data)
        if opcode == Opcode.LOGIN:
            self.offered |= {keys["DataDigest"]} if "DataDigest" in keys else set()
            if data.count(b"DataDigest=") > 1:
                self.problems.append("DataDigest twice in a login request")
            return
        for name, key in (("header_digest", "HeaderDigest"), ("data_digest", "DataDigest")):
            if key in keys:
                setattr(connection, name, keys[key] == "CRC32C")
        connection.full_feature = header[1] & 0x83 == FULL_FEATURE and not header[36]

    def _damaged(self, header: bytes, raw: bytearray, data_at: int) -> bytes:
        if header[0] & 0x3F == Opcode.DATA_IN and self.damage_data_in and len(raw) > data_at:
            with self._lock:
                self.damage_data_in -= 1
                if not self.damage_data_in:
                    raw[data_at + 7] ^= 0x40
        return bytes(raw)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
