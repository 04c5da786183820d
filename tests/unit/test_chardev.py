# SPDX-License-Identifier: Apache-2.0
"""Character devices with a front end that echoes: sockets, files, FIFOs, terminals, the ring buffer."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from target import chardev
from target.chardev import base
from target.chardev.base import Chardev
from target.chardev.command_line import parse_chardev
from target.chardev.memory import Ringbuf
from target.chardev.posix import Pty
from target.chardev.stream import MESSAGE_FDS, Stream
from target.config.keyval import parse_flat
from target.config.options import OptionError
from target.fdsets import Descriptors
from target.graph.errors import BlockError

chardev.load()
SECONDS = 10

Make = Callable[[str], Awaitable[Chardev]]
Connect = Callable[[str], "Client"]


async def echo(stream: Stream) -> None:
    await stream.write(b"hello\n")
    while data := await stream.read():
        for fd in stream.take_fds():
            data += os.read(fd, 100)
            os.close(fd)
        await stream.write(data)


@pytest_asyncio.fixture
async def make() -> AsyncIterator[Make]:
    """make(text) opens the device that --chardev TEXT describes; it is closed at the end."""
    made: list[Chardev] = []

    async def begin(text: str, descriptors: Descriptors | None = None) -> Chardev:
        request = parse_chardev(parse_flat(text, "backend").value)
        device = base.types()[request.type](request.id, request.options, descriptors or Descriptors())
        await device.open()
        made.append(device)
        return device

    yield begin
    for device in made:
        await device.close()


class Client:
    """A client of a unix socket; lines."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(path)

    async def line(self) -> bytes:
        return await asyncio.to_thread(self._line)

    def _line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            part = self.sock.recv(1)
            if not part:
                break
            data += part
        return data

    async def ask(self, data: bytes) -> bytes:
        self.sock.sendall(data)
        return await self.line()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """connect(path) makes a client; it is closed at the end."""
    made: list[Client] = []

    def begin(path: str) -> Client:
        made.append(Client(path))
        return made[-1]

    yield begin
    for client in made:
        client.sock.close()


async def test_a_socket_serves_clients_at_once_and_removes_its_file(
    make: Make, connect: Connect, scratch: Path
) -> None:
    path = str(scratch / "s")
    device = await make(f"socket,id=c,path={path},server=on,wait=off")
    early = connect(path)  # waits for the front end
    assert device.filename == f"disconnected:unix:{path},server=on"
    device.attach(echo)
    late = connect(path)
    for client in (early, late):
        assert await client.line() == b"hello\n"
    assert await late.ask(b"2\n") == b"2\n"
    assert await early.ask(b"1\n") == b"1\n"
    assert device.filename == f"unix:{path},server=on"
    with pytest.raises(BlockError, match="Device 'c' is in use"):
        device.attach(echo)
    await device.close()
    assert await early.line() == b""
    assert not os.path.exists(path)


async def test_clients_beyond_the_limit_wait(make: Make, connect: Connect, scratch: Path) -> None:
    path = str(scratch / "s")
    device = await make(f"socket,id=c,path={path},server=on,wait=off,max-connections=1")
    device.attach(echo)
    first = connect(path)
    assert await first.line() == b"hello\n"
    second = connect(path)
    second.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        await second.line()
    second.sock.settimeout(SECONDS)
    first.sock.close()
    assert await second.line() == b"hello\n"


async def test_many_clients(make: Make, connect: Connect, scratch: Path) -> None:
    """More than are served at once: the others get their turn when one leaves."""
    path = str(scratch / "s")
    device = await make(f"socket,id=c,path={path},server=on,wait=off")
    device.attach(echo)
    clients = [connect(path) for _ in range(120)]
    for client in clients[:100]:
        assert await client.ask(b"x\n") == b"hello\n"
        assert await client.line() == b"x\n"
    assert device.clients == 100
    for client in clients[:100]:
        client.sock.close()
    for client in clients[100:]:
        assert await client.line() == b"hello\n"


async def test_detach_ends_clients_and_another_front_end_may_come(
    make: Make, connect: Connect, scratch: Path
) -> None:
    path = str(scratch / "s")
    device = await make(f"socket,id=c,path={path},server=on,wait=off")
    device.attach(echo)
    client = connect(path)
    assert await client.line() == b"hello\n"
    await device.detach()
    assert await client.line() == b""
    late = connect(path)
    device.attach(echo)
    assert await late.line() == b"hello\n"


async def test_descriptors_arrive_and_those_beyond_the_limit_are_closed(
    make: Make, connect: Connect, scratch: Path
) -> None:
    path = str(scratch / "s")
    (await make(f"socket,id=c,path={path},server=on,wait=off")).attach(echo)
    client = connect(path)
    await client.line()
    reader, writer = os.pipe()
    os.write(writer, b"piped\n")
    os.close(writer)
    before = len(os.listdir("/proc/self/fd"))
    fds = array.array("i", [reader] * (MESSAGE_FDS + 5))
    client.sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    assert await client.line() == b"xpiped\n"
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)


async def test_descriptors_that_nobody_takes_do_not_pile_up(
    make: Make, connect: Connect, scratch: Path
) -> None:
    async def ignore(stream: Stream) -> None:
        while data := await stream.read():
            await stream.write(data)

    path = str(scratch / "s")
    (await make(f"socket,id=c,path={path},server=on,wait=off")).attach(ignore)
    client = connect(path)
    before = len(os.listdir("/proc/self/fd"))
    fds = array.array("i", [0] * MESSAGE_FDS)
    for _ in range(20):
        client.sock.sendmsg([b"x\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        await client.line()
    assert len(os.listdir("/proc/self/fd")) < before + 70
    client.sock.close()
    for _ in range(100):
        if len(os.listdir("/proc/self/fd")) <= before:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("descriptors are left")


async def test_a_client_that_does_not_read_stops_only_its_own_stream(
    make: Make, connect: Connect, scratch: Path
) -> None:
    path = str(scratch / "s")
    ended = asyncio.Event()

    async def talk(stream: Stream) -> None:
        try:
            await stream.write(bytes(16 << 20))
        finally:
            ended.set()

    device = await make(f"socket,id=c,path={path},server=on,wait=off")
    device.attach(talk)
    client = connect(path)
    await asyncio.sleep(0.2)
    assert not ended.is_set()
    await device.detach()  # does not wait for the client
    assert ended.is_set()
    assert client.sock.recv(1) == b"\0"


async def test_a_client_socket_reconnects(make: Make, scratch: Path) -> None:
    path = str(scratch / "s")
    device = await make(f"socket,id=c,path={path},reconnect-ms=50")
    device.attach(echo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(SECONDS)
        for _ in range(2):
            sock, _ = await asyncio.to_thread(server.accept)
            assert await asyncio.to_thread(sock.recv, 100) == b"hello\n"
            sock.close()


async def test_a_server_waits_for_its_first_client(make: Make, connect: Connect, scratch: Path) -> None:
    path = str(scratch / "s")
    opening = asyncio.ensure_future(make(f"socket,id=c,path={path},server=on"))
    await asyncio.sleep(0.1)
    assert not opening.done()
    client = connect(path)
    device = await asyncio.wait_for(opening, SECONDS)
    device.attach(echo)
    assert await client.line() == b"hello\n"


async def test_a_start_given_up_while_waiting_leaves_no_socket(make: Make, scratch: Path) -> None:
    path = scratch / "s"
    opening = asyncio.ensure_future(make(f"socket,id=c,path={path},server=on"))
    await asyncio.sleep(0.1)
    assert path.exists()
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    assert not path.exists()


async def test_abstract_and_inet_sockets(make: Make, connect: Connect) -> None:
    device = await make("socket,id=a,path=bt-test-abstract,abstract=on,server=on,wait=off")
    device.attach(echo)
    assert await connect("\0bt-test-abstract").line() == b"hello\n"
    assert device.filename == "unix:bt-test-abstract,abstract=on,tight=on,server=on"
    device = await make("socket,id=i,host=127.0.0.1,port=0,server=on,wait=off,nodelay=on")
    device.attach(echo)
    port = int(device.filename.split(":")[3].partition(",")[0])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        assert await asyncio.to_thread(sock.recv, 100) == b"hello\n"


async def test_a_listening_descriptor_by_name(make: Any, connect: Connect, scratch: Path) -> None:
    path = str(scratch / "s")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    descriptors = Descriptors()
    descriptors.name("mine", server.detach())
    device = await make("socket,id=c,fd=mine,server=on,wait=off", descriptors)
    device.attach(echo)
    assert await connect(path).line() == b"hello\n"
    assert not descriptors.named
    with pytest.raises(BlockError, match="File descriptor named 'mine' has not been found"):
        await make("socket,id=d,fd=mine,server=on,wait=off", descriptors)


async def test_a_ring_buffer_keeps_the_newest(make: Make) -> None:
    device = await make("ringbuf,id=r,size=8")
    assert isinstance(device, Ringbuf)
    device.write(b"0123456789")
    device.write(b"ab")
    assert device.read(3) == b"456"
    assert device.read(100) == b"789ab"
    device.attach(echo)
    await asyncio.sleep(0.05)
    assert device.read(100) == b"hello\n"


async def test_files_and_their_log(make: Make, scratch: Path) -> None:
    (scratch / "in").write_bytes(b"from a file\n")
    (scratch / "log").write_bytes(b"old\n")
    device = await make(
        f"file,id=f,path={scratch}/out,input-path={scratch}/in,logfile={scratch}/log,logappend=on"
    )
    device.attach(echo)
    while device.clients:
        await asyncio.sleep(0.01)
    assert (scratch / "out").read_bytes() == b"hello\nfrom a file\n"
    assert (scratch / "log").read_bytes() == b"old\nhello\nfrom a file\n"


async def test_fifos(make: Make, scratch: Path) -> None:
    os.mkfifo(scratch / "p.in")
    os.mkfifo(scratch / "p.out")
    (await make(f"pipe,id=p,path={scratch}/p")).attach(echo)
    writer = os.open(scratch / "p.in", os.O_WRONLY)
    reader = os.open(scratch / "p.out", os.O_RDONLY)
    os.write(writer, b"x\n")
    data = b""
    while len(data) < 8:
        data += await asyncio.wait_for(asyncio.to_thread(os.read, reader, 100), SECONDS)
    assert data == b"hello\nx\n"
    os.close(reader)
    os.close(writer)


async def test_a_terminal_is_opened_again_and_again(make: Make, scratch: Path) -> None:
    device = await make(f"pty,id=t,path={scratch}/link")
    assert isinstance(device, Pty)
    device.attach(echo)
    for _ in range(2):
        fd = os.open(scratch / "link", os.O_RDWR | os.O_NOCTTY)
        assert await asyncio.wait_for(asyncio.to_thread(os.read, fd, 100), SECONDS) == b"hello\n"
        os.write(fd, b"x\n")
        assert await asyncio.wait_for(asyncio.to_thread(os.read, fd, 100), SECONDS) == b"x\n"
        os.close(fd)
        while device.clients:
            await asyncio.sleep(0.01)
    await device.close()
    assert not os.path.lexists(scratch / "link")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "chardev: no id specified"),
        ("id=x", 'chardev: "x" missing backend'),
        ("udp,id=x", "'udp' is not a valid char driver name"),
        ("null,id=1", "Parameter 'id' expects an identifier"),
        ("null,id=x,size=3", "Parameter 'size' is unexpected"),
        ("socket,id=x,host=h", "chardev: socket: no port given"),
        ("socket,id=x,path=p,host=h,port=1", "One of 'path', 'fd' or 'host' option required."),
        ("socket,id=x,path=p,server=maybe", "Parameter 'server' expects 'on' or 'off'"),
        ("socket,id=x,path=p,delay=on,nodelay=on", "'delay' and 'nodelay' are mutually exclusive"),
    ],
)
def test_mistakes_in_options(text: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_chardev(parse_flat(text, "backend").value)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ringbuf,id=x,size=17", "size of ringbuf chardev must be power of two"),
        ("pipe,id=x,path=/nix/p", "Could not open '/nix/p': No such file or directory"),
        ("file,id=x,path=/nix/f", "Could not open '/nix/f': No such file or directory"),
        ("socket,id=x,path=/nix/s", "Failed to connect to '/nix/s': No such file or directory"),
        (
            "socket,id=x,path=/nix/s,server=on,wait=off",
            "Failed to bind socket to /nix/s: No such file or directory",
        ),
        (
            "socket,id=x,path=s,server=on,wait=off,reconnect=1",
            "'reconnect' option is incompatible with socket in server listen mode",
        ),
        (
            "socket,id=x,path=s,wait=on",
            "'wait' option is incompatible with socket in client connect mode",
        ),
        ("socket,id=x,path=s,telnet=on,server=on,wait=off", "option 'telnet' is not supported"),
        ("socket,id=x,path=s,tls-creds=t,server=on,wait=off", "option 'tls-creds' is not supported"),
    ],
)
async def test_devices_that_cannot_be_had(text: str, message: str, make: Make) -> None:
    with pytest.raises(BlockError) as error:
        await make(text)
    assert str(error.value) == message


def test_the_older_notation() -> None:
    found = parse_flat("socket,id=c,path=a,,b,server,nowait", "backend")
    assert found.value == {"backend": "socket", "id": "c", "path": "a,b", "server": "on", "wait": "off"}
    assert parse_flat("help", "backend").help
