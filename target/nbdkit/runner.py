# SPDX-License-Identifier: Apache-2.0
"""The process of a plugin: loads the script, opens the one connection, and serves requests until the end.

The target starts it as ``python -c "... runner.main()" PARENT SOCKET MEMORY``. It dies with the target.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from target.nbdkit import module, wire
from target.nbdkit.connection import Connection
from target.nbdkit.plugin import PARALLEL, Failed, Plugin

PR_SET_PDEATHSIG = 1
RECEIVE_BYTES = 64 << 10
# One at a time: replies wait for so many others or so long, unless nothing is left to do.
REPLIES_AT_ONCE = 8
REPLIES_WAIT = 50e-6

# What the target is told of an open connection.
DESCRIBED = (
    *("size", "can_write", "can_zero", "can_fast_zero", "can_trim", "can_fua", "can_flush", "can_cache"),
    *("can_extents", "can_multi_conn", "is_rotational", "description", "minimum", "maximum"),
)

Request = tuple[int, int, int, int, int]  # op, flags, slot, length, offset


class Channel:
    """The socket to the target, and the memory that is shared with it."""

    def __init__(self, fd: int, memory: int) -> None:
        self.own = frozenset((fd, memory))
        for each in self.own:
            os.set_inheritable(each, False)
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(True)
        self._memory = memoryview(mmap.mmap(memory, wire.MEMORY_BYTES))
        self.slots = [
            self._memory[at : at + wire.SLOT_BYTES] for at in range(0, wire.MEMORY_BYTES, wire.SLOT_BYTES)
        ]
        self._lock = threading.Lock()
        self._opened = False
        self._asked: list[int] = []

    def receive_frame(self) -> Any:
        (length,) = wire.FRAME.unpack(self._exactly(wire.FRAME.size))
        return json.loads(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                os._exit(0)
            data += more
        return data

    def send_frame(self, value: Any) -> None:
        self.send(wire.frame(value))

    def send(self, data: bytes | bytearray) -> None:
        with self._lock:
            self.socket.sendall(data)

    def ask(self, kind: int) -> None:
        """A SHUTDOWN or DISCONNECT, each once, and not before the target knows that the plugin is open."""
        with self._lock:
            if kind in self._asked:
                return
            self._asked.append(kind)
            if self._opened:
                self.socket.sendall(wire.REPLY.pack(kind, 0, 0, 0))

    def send_opened(self, value: Any) -> None:
        with self._lock:
            self._opened = True
            asked = b"".join(wire.REPLY.pack(kind, 0, 0, 0) for kind in self._asked)
            self.socket.sendall(wire.frame({"opened": value}) + asked)

    def batches(self) -> Iterator[list[Request]]:
        """Requests as they come, several at a time, until the target closes its end."""
        rest = b""
        size = wire.REQUEST.size
        while data := self.socket.recv(RECEIVE_BYTES):
            data = rest + data
            whole = len(data) // size * size
            rest = data[whole:]
            yield list(wire.REQUEST.iter_unpack(data[:whole]))


def serve_one_by_one(channel: Channel, connection: Connection) -> None:
    """All in this thread. Replies are sent a few at a time, so that the target has work meanwhile."""
    pack, slots, run = wire.REPLY.pack, channel.slots, connection.request
    for batch in channel.batches():
        replies = bytearray()
        since = perf_counter()
        for op, flags, slot, length, offset in batch:
            if op == wire.CLOSE:
                return
            replies += pack(wire.DONE, 0, slot, run(op, flags, length, offset, slots[slot]))
            if len(replies) >= REPLIES_AT_ONCE * wire.REPLY.size or perf_counter() - since > REPLIES_WAIT:
                channel.send(replies)
                replies = bytearray()
                since = perf_counter()
        if replies:
            channel.send(replies)
    os._exit(0)


def serve_in_parallel(channel: Channel, connection: Connection, threads: int) -> None:
    """Each request in one of several threads."""
    queue: SimpleQueue[Request | None] = SimpleQueue()

    def work() -> None:
        pack, slots, run = wire.REPLY.pack, channel.slots, connection.request
        while request := queue.get():
            op, flags, slot, length, offset = request
            channel.send(pack(wire.DONE, 0, slot, run(op, flags, length, offset, slots[slot])))

    workers = [threading.Thread(target=work, name=f"nbdkit-{n}", daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    for batch in channel.batches():
        for request in batch:
            if request[0] == wire.CLOSE:
                connection.server.ending.set()
                for _ in workers:
                    queue.put(None)
                for worker in workers:
                    worker.join()
                return
            queue.put(request)
    os._exit(0)


def die_with(parent: int) -> None:
    """Ends this process when the target ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    # One that leaks goes first when the machine runs out of memory.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def run(channel: Channel) -> None:
    setup = channel.receive_frame()
    server = module.Server(setup["script"], setup["verbose"], channel.ask, channel.own)
    module.install(server, wire.SHUTDOWN, wire.DISCONNECT)
    plugin = Plugin(server)
    try:
        plugin.load()
        for key, value in setup["config"]:
            plugin.config(key, value)
        plugin.call_if("config_complete")
        model = plugin.thread_model()
        plugin.call_if("get_ready")
        plugin.call_if("after_fork")
    except Failed as failure:
        channel.send_frame({"error": str(failure)})
        sys.exit(1)
    connection = Connection(plugin, setup["export"], setup["readonly"])
    try:
        connection.open()
    except Failed as failure:
        channel.send_frame({"error": str(failure), "exports": exports(plugin, setup["readonly"])})
        clean_up(plugin)
        sys.exit(1)
    channel.send_opened(described(connection, model))
    if model == PARALLEL:
        serve_in_parallel(channel, connection, setup["threads"])
    else:
        serve_one_by_one(channel, connection)
    connection.close()
    clean_up(plugin)


def clean_up(plugin: Plugin) -> None:
    with contextlib.suppress(Failed):  # it is reported
        plugin.call_if("cleanup")


def exports(plugin: Plugin, readonly: bool) -> list[str]:
    """The names that the plugin offers, to help a user whose name it refused."""
    if plugin.find("list_exports") is None:
        return []
    try:
        return [name for name, _ in plugin.list_exports(readonly)]
    except Failed:
        return []


def described(connection: Connection, model: int) -> dict[str, Any]:
    return {"thread_model": model, **{name: getattr(connection, name) for name in DESCRIBED}}


def hide() -> None:
    """Leaves the interpreter as nbdkit's would be: a plugin may have a module named ``target`` itself."""
    sys.argv = [""]
    for name in [name for name in sys.modules if name == "target" or name.startswith("target.")]:
        del sys.modules[name]


def main() -> None:
    parent, fd, memory = map(int, sys.argv[1:4])
    die_with(parent)
    hide()
    run(Channel(fd, memory))
