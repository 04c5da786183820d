# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest with vsock_loopback: an NBD server on a vsock port, and the nbd driver as its client.

Prints RESULT lines; the last one is the sum of the disk's content.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import subprocess
import time
from pathlib import Path

from target.exports.nbd.protocol import Command
from target.peers.nbd_client import NbdClient
from target.peers.nbd_script import ServerOptions
from target.peers.nbd_server import NbdServer, ServerThread

LOOPBACK = 1  # VMADDR_CID_LOCAL
PORT, CLOSED_PORT = 10809, 4444
SIZE = 8 << 20
READY_SECONDS = 60


def result(name: str, value: object) -> None:
    print(f"RESULT {name} {value}", flush=True)


def listener() -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.bind((socket.VMADDR_CID_ANY, PORT))
    sock.listen(16)
    return sock


def daemon(node: str, export: str) -> list[str]:
    front = ["--nbd-server", f"addr.type=unix,addr.path=/tmp/{export}.sock"]
    exported = ["--export", f"type=nbd,id={export},node-name=disk,name=disk,writable=on"]
    return [
        "/bin/blocktarget",
        "daemon",
        "--blockdev",
        f"driver=nbd,node-name=disk,{node}",
        *front,
        *exported,
    ]


async def use(path: str) -> None:
    """Random writes, reads and zeroes against a model."""
    client = await NbdClient.connect(path, "disk")
    source, model = random.Random(1), bytearray(SIZE)
    for _ in range(60):
        offset, length = source.randrange(SIZE // 2 // 4096) * 4096, source.choice((512, 4096, 100_352))
        if source.random() < 0.7:
            model[offset : offset + length] = data = source.randbytes(length)
            await client.write(offset, data)
        else:
            model[offset : offset + length] = bytes(length)
            await client.write_zeroes(offset, length)
        assert await client.read(offset, length) == model[offset : offset + length]
    await client.flush()
    extents = await client.map()
    assert sum(length for length, _ in extents) == SIZE and len(extents) > 1
    await client.close()


async def reads_again(path: str) -> None:
    client = await NbdClient.connect(path, "disk")
    assert len(await client.read(0, 4096)) == 4096
    await client.close()


def ready(path: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_SECONDS
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < end, "the target is not ready"
        time.sleep(0.1)


def main() -> None:
    server = NbdServer(ServerOptions(size=SIZE))
    thread = ServerThread(server, listener())
    with thread:
        first = f"server.type=vsock,server.cid={LOOPBACK},server.port={PORT},export=disk,reconnect-delay=30"
        argv = daemon(first, "first")
        process = subprocess.Popen(argv)
        ready("/tmp/first.sock", process)
        asyncio.run(use("/tmp/first.sock"))
        result("connections", server.accepted)
        thread.cut()
        asyncio.run(reads_again("/tmp/first.sock"))
        result("again", server.accepted)
        process.terminate()
        result("status", process.wait(30))
        process = subprocess.Popen(daemon(f"uri=nbd+vsock://{LOOPBACK}:{PORT}/disk", "second"))
        ready("/tmp/second.sock", process)
        asyncio.run(reads_again("/tmp/second.sock"))
        process.terminate()
        result("status-uri", process.wait(30))
    result("violations", len(server.violations))
    result("trims-and-zeroes", len(server.commands(Command.WRITE_ZEROES)))
    nobody = f"server.type=vsock,server.cid={LOOPBACK},server.port={CLOSED_PORT},export=disk"
    done = subprocess.run(daemon(nobody, "third"), capture_output=True, text=True, timeout=60)
    result("nobody", f"{done.returncode} {done.stderr.strip()}")
    result("sha256", hashlib.sha256(server.disk.read(0, SIZE)).hexdigest())


if __name__ == "__main__":
    main()
