# SPDX-License-Identifier: Apache-2.0
"""Image locks: QEMU's bytes, seen by and seeing QEMU's own programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from target.drivers import locking
from target.drivers.locking import ImageLock
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.permissions import Perm

CR, W, WU, RS = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE


@pytest.fixture
def image(scratch: Path) -> Path:
    path = scratch / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def locks(image: Path) -> Iterator[tuple[ImageLock, ImageLock]]:
    """Two locks of different open files, as two processes have them."""
    fds = [os.open(image, os.O_RDWR) for _ in range(2)]
    yield ImageLock(fds[0], "one"), ImageLock(fds[1], "two")
    for fd in fds:
        os.close(fd)


def held(path: Path) -> set[int]:
    """The bytes of the file on which there are OFD read locks."""
    inode = path.stat().st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, mode, _, where, first, last = line.split()
        if kind == "OFDLCK" and mode == "READ" and int(where.split(":")[2]) == inode:
            found.update(range(int(first), int(last) + 1))
    return found


def test_bytes_follow_the_permissions(locks: tuple[ImageLock, ImageLock], image: Path) -> None:
    lock, _ = locks
    lock.prepare(CR | W, Perm.ALL & ~(W | RS))
    lock.commit(CR | W, Perm.ALL & ~(W | RS))
    assert held(image) == {100, 101, 201, 203}
    lock.prepare(CR | RS, Perm.ALL)
    assert held(image) == {100, 101, 103, 201, 203}  # both states until it is committed
    lock.commit(CR | RS, Perm.ALL)
    assert held(image) == {100, 103}
    lock.commit(Perm.NONE, Perm.ALL)
    assert held(image) == set()


def test_readers_share(locks: tuple[ImageLock, ImageLock]) -> None:
    for lock in locks:
        lock.prepare(CR, CR | WU)


def test_a_writer_in_the_way(locks: tuple[ImageLock, ImageLock], image: Path) -> None:
    first, second = locks
    first.prepare(CR | W, CR | WU)
    before = held(image)
    with pytest.raises(BlockError) as info:
        second.prepare(W, Perm.ALL)
    assert str(info.value) == 'Failed to get "write" lock: Is another process using the image [two]?'
    with pytest.raises(BlockError) as info:
        second.prepare(CR, Perm.ALL & ~W)
    assert str(info.value) == 'Failed to get shared "write" lock: Is another process using the image [two]?'
    assert held(image) == before
    assert second.held == set()


def test_a_refused_change_keeps_the_old_state(locks: tuple[ImageLock, ImageLock], image: Path) -> None:
    first, second = locks
    first.prepare(CR, Perm.ALL & ~W)
    second.prepare(CR, Perm.ALL)
    with pytest.raises(BlockError):
        second.prepare(CR | W, Perm.ALL)
    assert second.held == {100}
    assert held(image) == {100, 201}


def test_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    assert not locking.supported(reader)


def qemu_io(image: Path, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = ["qemu-io", *flags, "-f", "raw", "-c", command, str(image)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)


async def test_qemu_refuses_what_we_write(graph: Graph, image: Path) -> None:
    node = await graph.add({"driver": "file", "node-name": "n", "filename": str(image)})
    assert qemu_io(image, "write 0 512").returncode == 0  # a node that nobody uses locks nothing
    edge = await graph.attach_root("a user", node, CR | W, Perm.ALL)
    refused = qemu_io(image, "write 0 512")
    assert refused.returncode == 1
    assert 'Failed to get "write" lock' in refused.stderr
    assert qemu_io(image, "read 0 512", "-r").returncode == 0
    await graph.detach_root(edge)
    assert qemu_io(image, "write 0 512").returncode == 0


async def test_we_refuse_what_qemu_writes(graph: Graph, image: Path) -> None:
    node = await graph.add({"driver": "file", "node-name": "n", "filename": str(image)})
    argv = ["qemu-io", "-f", "raw", str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("length\n")
        assert other.stdout.readline()
        with pytest.raises(BlockError, match=r"node 'n': Failed to get shared \"write\" lock: Is another"):
            await graph.attach_root("a user", node, CR | W, Perm.ALL)
        await graph.add({"driver": "file", "node-name": "unlocked", "filename": str(image), "locking": "off"})
        edge = await graph.attach_root("a user", graph.get("unlocked"), CR | W, Perm.ALL)
        await graph.detach_root(edge)
        other.stdin.write("quit\n")
    edge = await graph.attach_root("a user", node, CR | W, Perm.ALL)
    await graph.detach_root(edge)


async def test_two_nodes_of_one_process_exclude_each_other(graph: Graph, image: Path) -> None:
    for name in ("a", "b"):
        await graph.add({"driver": "file", "node-name": name, "filename": str(image)})
    edge = await graph.attach_root("a user", graph.get("a"), CR | W, Perm.ALL)
    with pytest.raises(BlockError, match="node 'b': Failed to get"):
        await graph.attach_root("another", graph.get("b"), CR | W, Perm.ALL)
    await graph.detach_root(edge)
    await graph.detach_root(await graph.attach_root("another", graph.get("b"), CR | W, Perm.ALL))


def test_pidfile_is_exclusive(scratch: Path) -> None:
    path = scratch / "pid"
    # POSIX locks belong to a process, so the second one has to be another.
    fd = locking.open_locked_pidfile(str(path))
    child = os.fork()
    if child == 0:
        try:
            locking.open_locked_pidfile(str(path))
        except BlockError as error:
            os._exit(0 if f"Failed to lock '{path}'" in str(error) else 2)
        os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
    os.close(fd)
    os.close(locking.open_locked_pidfile(str(path)))


def test_pidfile_follows_no_link(scratch: Path) -> None:
    (scratch / "pid").symlink_to(scratch / "precious")
    with pytest.raises(BlockError, match="cannot create PID file"):
        locking.open_locked_pidfile(str(scratch / "pid"))
    assert not (scratch / "precious").exists()
