# SPDX-License-Identifier: Apache-2.0
"""The bytes of a handshake on a socket, for both sides of it."""

from __future__ import annotations

import asyncio
import socket


class SocketStream:
    """Exact reads on a non-blocking socket: what was not asked for stays in the kernel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def read_exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = await self._loop.sock_recv(self._sock, length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)
