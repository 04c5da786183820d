# SPDX-License-Identifier: Apache-2.0
"""The vhost-user-blk export against a front end that keeps to the specifications."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.datapath import UNMAP, Op
from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.device import WRITEBACK_OFFSET, Feature
from target.exports.vhost_user_blk.messages import ProtocolFeature, Request
from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    DISCARD,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SEGMENT,
    UNSUPP,
    UNTOUCHED,
    WRITE_ZEROES,
    Buffer,
    Connection,
    FrontEnd,
    GuestMemory,
    Refusal,
)
from tests.support.vhost import Target

SIZE = 1 << 20
Serve = Callable[..., Target]


@pytest.fixture
def path(scratch: Path) -> str:
    return str(scratch / "s")


@pytest.fixture
def serve(path: str) -> Iterator[Serve]:
    """serve(**options) starts an export at ``path``."""
    made: list[Target] = []

    def begin(**options: Any) -> Target:
        made.append(Target(Path(path), **options))
        return made[-1]

    yield begin
    for target in made:
        target.close()


def data(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def operations(target: Target) -> list[Op]:
    return [op for op, *_ in target.disk.seen]


def with_flushes(operations: list[Op], durable: bool) -> list[Op]:
    """Durable writes reach a device that knows no FUA as a write and a flush."""
    return [part for op in operations for part in ((op, Op.FLUSH) if durable else (op,))]


@pytest.mark.parametrize("protocol", [-1, 0], ids=["acknowledged", "plain"])
@pytest.mark.parametrize(
    "features", [-1, ~Feature.RING_EVENT_IDX, ~Feature.RING_INDIRECT_DESC, Feature.VERSION_1, 0],
    ids=["all", "no event idx", "no indirect", "version 1 alone", "legacy"],
)  # fmt: skip
def test_reads_and_writes(serve: Serve, path: str, features: int, protocol: int) -> None:
    target = serve()
    with FrontEnd.connect(path, features=features, protocol=protocol) as front_end:
        for i in range(10):
            front_end.write(i * 8, data(4096, i))
        assert target.disk.data[: 10 * 4096] == b"".join(data(4096, i) for i in range(10))
        assert front_end.read(4, 8192) == target.disk.data[2048 : 2048 + 8192]
        indirect = Feature.RING_INDIRECT_DESC in front_end.features
        assert front_end.request(OUT, 0, data(65536), indirect=indirect, pieces=100)[0] == OK
        assert front_end.request(IN, 0, into=65536, indirect=indirect, pieces=33) == (OK, data(65536), 65537)


def test_queues_on_several_threads(serve: Serve, path: str) -> None:
    serve(threads=2, **{"num-queues": 4})
    with FrontEnd.connect(path, queues=4) as front_end:
        assert front_end.connection.ask_u64(Request.GET_QUEUE_NUM) == 4
        for queue in range(4):
            front_end.write(queue, data(512, queue), queue=queue)
        for queue in range(4):
            assert front_end.read(3 - queue, 512, queue=queue) == data(512, 3 - queue)


def test_many_in_flight(serve: Serve, path: str) -> None:
    """A full ring, several times around, completed in any order."""
    target = serve()
    target.disk.data[:] = data(SIZE)
    with FrontEnd.connect(path, size=64) as front_end:
        memory, (ring,) = front_end.memory, front_end.rings
        mark = memory.mark
        for lap in range(5):
            memory.release_all(mark)
            sinks = {}
            for i in range(21):
                sector = random.Random(lap * 100 + i).randrange(SIZE // 512 - 8)
                sink, status = memory.allocate(4096), memory.put(bytes([UNTOUCHED]))
                header = memory.put(BLK_HEADER.pack(IN, 0, sector))
                head = ring.add([Buffer(header, 16), Buffer(sink, 4096, True), Buffer(status, 1, True)])
                sinks[head] = (sector, sink, status)
            ring.notify()
            done = ring.wait_used(21)
            assert sorted(used.head for used in done) == sorted(sinks)
            for used in done:
                sector, sink, status = sinks[used.head]
                assert (memory.read(status, 1)[0], used.length) == (OK, 4097)
                assert memory.read(sink, 4096) == target.disk.data[sector * 512 : sector * 512 + 4096]
                ring.reclaim(used.head)


@pytest.mark.parametrize("name", [None, "a serial number", "x" * 20])
def test_serial(serve: Serve, path: str, name: str | None) -> None:
    serve(id="an-export-with-a-long-name", **({"serial": name} if name else {}))
    with FrontEnd.connect(path) as front_end:
        expected = (name or "an-export-with-a-long-name").encode()[:20].ljust(20, b"\0")
        assert front_end.identify() == expected
        assert front_end.request(GET_ID, into=1) == (OK, expected[:1], 2)
        assert front_end.request(GET_ID, into=24) == (OK, expected + b"\xa5" * 4, 20)


def test_ranges(serve: Serve, path: str) -> None:
    """Several ranges in one request, each handed on with what it permits."""
    target = serve()
    with FrontEnd.connect(path) as front_end:
        front_end.write(0, data(65536))
        target.disk.seen.clear()
        front_end.discard([(8, 8), (0, 0), (32, 1)])
        front_end.write_zeroes([(0, 2), (4, 1)])
        front_end.write_zeroes([(100, 10)], unmap=True)
        assert target.disk.seen == [
            (Op.DISCARD, 0, 4096, 4096),
            (Op.DISCARD, 0, 16384, 512),
            (Op.ZEROES, 0, 0, 1024),
            (Op.ZEROES, 0, 2048, 512),
            (Op.ZEROES, UNMAP, 51200, 5120),
        ]
        assert (
            front_end.read(0, 4096)
            == bytes(1024) + data(65536)[1024:2048] + bytes(512) + data(65536)[2560:4096]
        )


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_ranges_that_are_refused(serve: Serve, path: str, kind: int) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        for payload, status in [
            (b"", IOERR),
            (bytes(15), IOERR),
            (bytes(17), IOERR),
            (SEGMENT.pack(0, 8, 0) * 33, IOERR),
            (SEGMENT.pack(0, 0xFFFFFFFF, 0), IOERR),
            (SEGMENT.pack(SIZE // 512 - 1, 2, 0), IOERR),
            (SEGMENT.pack(1 << 63, 1, 0), IOERR),
            (SEGMENT.pack(0, 8, 2), UNSUPP),
            (SEGMENT.pack(0, 8, 1 << 31), UNSUPP),
            (SEGMENT.pack(0, 8, 0) + SEGMENT.pack(SIZE // 512, 1, 0), IOERR),
            *([(SEGMENT.pack(0, 8, 1), UNSUPP)] if kind == DISCARD else []),
        ]:
            assert front_end.request(kind, out=payload)[0] == status, payload
        assert target.disk.seen == []
    with FrontEnd.connect(path, features=~(Feature.DISCARD | Feature.WRITE_ZEROES)) as front_end:
        assert front_end.request(kind, out=SEGMENT.pack(0, 8, 0))[0] == UNSUPP


@pytest.mark.parametrize(
    ("features", "options", "durable"),
    [
        (Feature.FLUSH, {}, False),
        (Feature.FLUSH | Feature.CONFIG_WCE, {}, False),
        (Feature.CONFIG_WCE, {}, True),
        (Feature.VERSION_1, {}, True),
        (Feature.FLUSH, {"writethrough": True}, True),
    ],
    ids=["flush", "flush and wce", "wce alone", "neither", "writethrough=on"],
)
def test_write_through(
    serve: Serve, path: str, features: int, options: dict[str, Any], durable: bool
) -> None:
    """What SeaBIOS negotiates has no flush, so its writes must be durable when they are done."""
    target = serve(**options)
    with FrontEnd.connect(path, features=features | Feature.VERSION_1 | Feature.WRITE_ZEROES) as front_end:
        front_end.write(0, data(512))
        front_end.write_zeroes([(8, 1)])
        assert operations(target) == with_flushes([Op.WRITE, Op.ZEROES], durable)


def test_cache_mode_of_a_driver(serve: Serve, path: str) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_config(WRITEBACK_OFFSET, 1) == b"\1"
        front_end.write(0, data(512))
        front_end.set_config(WRITEBACK_OFFSET, b"\0")
        front_end.write(0, data(512))
        front_end.set_config(WRITEBACK_OFFSET, b"\1")
        front_end.write(0, data(512))
        front_end.flush()
        # What was written before the switch is made durable by it; what comes after it, one by one.
        assert operations(target) == [Op.WRITE, Op.FLUSH, Op.WRITE, Op.FLUSH, Op.WRITE, Op.FLUSH]


def test_large_blocks(serve: Serve, path: str) -> None:
    serve(**{"logical-block-size": 4096})
    with FrontEnd.connect(path) as front_end:
        assert struct.unpack("<I", front_end.get_config(20, 4)) == (4096,)
        front_end.write(8, data(4096))
        assert front_end.request(OUT, 1, data(4096))[0] == IOERR
        assert front_end.request(OUT, 8, data(512))[0] == IOERR
        assert front_end.request(IN, 4, into=4096)[0] == IOERR
        assert front_end.request(DISCARD, out=SEGMENT.pack(4, 8, 0))[0] == IOERR


def test_read_only(serve: Serve, path: str) -> None:
    target = serve(writable=False)
    with FrontEnd.connect(path) as front_end:
        assert Feature.RO in front_end.features
        assert front_end.request(OUT, 0, data(512))[0] == IOERR
        assert front_end.request(WRITE_ZEROES, out=SEGMENT.pack(0, 8, 0))[0] in (IOERR, UNSUPP)
        assert front_end.request(DISCARD, out=SEGMENT.pack(0, 8, 0))[0] in (IOERR, UNSUPP)
        assert front_end.read(0, 512) == bytes(512)
        assert [op for op, *_ in target.disk.seen] == [Op.READ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_errors_of_the_device(serve: Serve, path: str, number: int) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        target.disk.error = OSError(number, "")
        assert front_end.request(OUT, 0, data(512)) == (IOERR, b"", 1)
        # What was not read must not be reported as read.
        assert front_end.request(IN, 0, into=512)[::2] == (IOERR, 0)
        assert front_end.request(DISCARD, out=SEGMENT.pack(0, 8, 0))[0] == IOERR
        target.disk.error = None
        front_end.write(0, data(512))


def test_firmware_first_then_a_kernel(serve: Serve, path: str) -> None:
    """SeaBIOS takes few features and one queue, stops it, and leaves the device to Linux."""
    target = serve(**{"num-queues": 2})
    firmware = Feature.SEG_MAX | Feature.BLK_SIZE | Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
    with FrontEnd.connect(path, features=firmware, size=128) as front_end:
        front_end.write(0, data(512))
        assert operations(target) == [Op.WRITE, Op.FLUSH]
        front_end.connection.tell_state(Request.SET_VRING_ENABLE, 0, 0)
        assert front_end.stop_queue(0) == 1
        offered = front_end.connection.ask_u64(Request.GET_FEATURES)
        front_end.set_features(offered)
        for queue in range(2):
            front_end.start_queue(queue, size=256)
        assert front_end.read(0, 512, queue=1) == data(512)
        front_end.write(1, data(512))
        assert operations(target)[-2:] == [Op.READ, Op.WRITE]


def test_disabled_queue_waits(serve: Serve, path: str) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        (ring,), memory = front_end.rings, front_end.memory
        front_end.connection.tell_state(Request.SET_VRING_ENABLE, 0, 0)
        header, status = memory.put(BLK_HEADER.pack(OUT, 0, 0)), memory.put(bytes([UNTOUCHED]))
        ring.add([Buffer(header, 16), Buffer(memory.put(data(512)), 512), Buffer(status, 1, True)])
        ring.kick()
        time.sleep(0.1)
        assert target.disk.seen == []
        front_end.connection.tell_state(Request.SET_VRING_ENABLE, 0, 1)
        assert len(ring.wait_used()) == 1
        assert target.disk.data[:512] == data(512)


def hold_a_write(front_end: FrontEnd, target: Target) -> None:
    """One write is in flight and does not end before target.let_go()."""
    memory, ring = front_end.memory, front_end.rings[0]
    target.call(target.hold())
    header, status = memory.put(BLK_HEADER.pack(OUT, 0, 8)), memory.put(bytes([UNTOUCHED]))
    ring.add([Buffer(header, 16), Buffer(memory.put(data(512)), 512), Buffer(status, 1, True)])
    ring.kick()
    until = time.monotonic() + 10
    while not target.disk.seen:
        assert time.monotonic() < until
        time.sleep(0.001)


def release_later(target: Target, done: list[float]) -> threading.Thread:
    def run() -> None:
        time.sleep(0.2)
        done.append(time.monotonic())
        target.call(target.let_go())

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["base", "disable", "remove", "add", "reset"])
def test_stopping_waits_for_what_is_in_flight(serve: Serve, path: str, how: str) -> None:
    target = serve()
    memories = [GuestMemory(), GuestMemory(base=1 << 32)]
    with FrontEnd.connect(path, memories=memories) as front_end:
        hold_a_write(front_end, target)
        let_go: list[float] = []
        thread = release_later(target, let_go)
        if how == "base":
            assert front_end.stop_queue(0) == 1
        elif how == "disable":
            front_end.connection.tell_state(Request.SET_VRING_ENABLE, 0, 0)
        elif how == "remove":
            front_end.remove_region(memories[1].region)
        elif how == "add":
            more = GuestMemory(base=2 << 32)
            front_end.memories.append(more)
            front_end.add_region(more.region, more.fd)
        else:
            front_end.connection.tell(Request.RESET_OWNER)
        assert let_go, "answered while a request was in flight"
        assert [used.length for used in front_end.rings[0].take_used()] == [1]
        thread.join()
        assert target.disk.data[4096:4608] == data(512)


def test_disconnect_with_requests_in_flight(serve: Serve, path: str) -> None:
    """The memory stays mapped until they end; the next front end is served after that."""
    target = serve()
    with FrontEnd.connect(path) as front_end:
        hold_a_write(front_end, target)
    thread = release_later(target, [])
    with FrontEnd.connect(path) as front_end:
        assert front_end.read(8, 512) == data(512)
    thread.join()
    # Nothing landed on sector 0 (CVE-2023-5088).
    assert target.disk.data[:4096] == bytes(4096)


def test_export_ends_with_requests_in_flight(serve: Serve, path: str) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        hold_a_write(front_end, target)
        let_go: list[float] = []
        thread = release_later(target, let_go)
        target.call(target.export.stop())
        assert let_go, "ended while a request was in flight"
        thread.join()
        assert target.disk.data[4096:4608] == data(512)
        assert front_end.connection.ended()
    assert not os.path.exists(path)


def test_resize(serve: Serve, path: str) -> None:
    target = serve()
    with FrontEnd.connect(path) as front_end:
        assert front_end.request(IN, SIZE // 512, into=512)[0] == IOERR
        with front_end.open_channel() as channel:
            target.call(target.resize(2 * SIZE))
            assert channel.recv(64) == messages.config_changed()
        assert struct.unpack("<Q", front_end.get_config(0, 8)) == (2 * SIZE // 512,)
        front_end.write(SIZE // 512, data(512))
        target.call(target.resize(3 * SIZE))  # nobody listens any more
        front_end.write(2 * SIZE // 512, data(512))


def test_regions(serve: Serve, path: str) -> None:
    """Buffers over neighbouring regions; offsets into files that are no multiple of the page."""
    target = serve()
    low, high = GuestMemory(1 << 20), GuestMemory(1 << 20, base=1 << 20, file_offset=8192)
    with FrontEnd.connect(path, memories=[low, high], features=~Feature.RING_EVENT_IDX) as front_end:
        content = data(8192)
        low.write((1 << 20) - 4096, content[:4096])
        high.write(1 << 20, content[4096:])
        ring = front_end.rings[0]
        header, status = low.put(BLK_HEADER.pack(OUT, 0, 0)), low.put(bytes([UNTOUCHED]))
        ring.add([Buffer(header, 16), Buffer((1 << 20) - 4096, 8192), Buffer(status, 1, True)])
        ring.notify()
        ring.wait_used()
        assert low.read(status, 1)[0] == OK
        assert target.disk.data[:8192] == content


def test_region_at_an_odd_offset(serve: Serve, path: str) -> None:
    target = serve()
    main, odd = GuestMemory(), GuestMemory(1 << 20, base=1 << 32)
    region = odd.region._replace(guest_address=1 << 32, size=4096, mmap_offset=1000)
    with FrontEnd(path, [main, odd]) as front_end:
        front_end.negotiate()
        front_end.add_region(main.region, main.fd)
        front_end.add_region(region, odd.fd)
        ring = front_end.start_queue(0)
        odd.map[1000 : 1000 + 512] = data(512)
        header, status = main.put(BLK_HEADER.pack(OUT, 0, 0)), main.put(bytes([UNTOUCHED]))
        ring.add([Buffer(header, 16), Buffer(1 << 32, 512), Buffer(status, 1, True)])
        ring.notify()
        ring.wait_used()
        assert target.disk.data[:512] == data(512)


def test_memory_table_replaced_under_a_running_queue(serve: Serve, path: str) -> None:
    serve()
    without_slots = ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    with FrontEnd.connect(path, protocol=without_slots) as front_end:
        front_end.write(0, data(512))
        more = GuestMemory(base=1 << 32)
        front_end.memories.append(more)
        front_end.share_memory()
        assert front_end.read(0, 512) == data(512)
        assert front_end.connection.ask_u64(Request.GET_MAX_MEM_SLOTS) >= 32
        with pytest.raises(Refusal):
            front_end.remove_region(more.region)


def test_queue_moved_with_base_kept(serve: Serve, path: str) -> None:
    serve()
    with FrontEnd.connect(path) as front_end:
        for i in range(5):
            front_end.write(i, data(512, i))
        base = front_end.stop_queue(0)
        assert base == 5
        front_end.start_queue(0, size=64, base=base)
        assert front_end.read(4, 512) == data(512, 4)
        assert front_end.stop_queue(0) == 6


def test_a_ring_taken_over_is_notified_at_once(serve: Serve, path: str) -> None:
    """The back end before may have ended with its last notification: a guest hung after a restart."""
    serve()
    with FrontEnd.connect(path) as front_end:
        (ring,) = front_end.rings
        front_end.write(0, data(512))
        base = front_end.stop_queue(0)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(ring.call_fd)
        front_end.set_up(0, ring, base)
        assert select.select([ring.call_fd], [], [], 5)[0]


def test_without_kick_and_call(serve: Serve, path: str) -> None:
    """Both descriptors may be missing: then each side polls."""
    serve()
    with FrontEnd.connect(path) as front_end:
        c, (ring,), memory = front_end.connection, front_end.rings, front_end.memory
        c.tell_u64(Request.SET_VRING_CALL, messages.VRING_NO_FD)
        c.tell_u64(Request.SET_VRING_KICK, messages.VRING_NO_FD)
        for i in range(3):
            header, status = memory.put(BLK_HEADER.pack(OUT, 0, i)), memory.put(bytes([UNTOUCHED]))
            ring.add([Buffer(header, 16), Buffer(memory.put(data(512)), 512), Buffer(status, 1, True)])
            until = time.monotonic() + 10
            while not ring.take_used():
                assert time.monotonic() < until
                time.sleep(0.001)


def test_call_descriptor_replaced_while_it_runs(serve: Serve, path: str) -> None:
    serve()
    with FrontEnd.connect(path) as front_end:
        (ring,) = front_end.rings
        for i in range(20):
            old, ring.call_fd = ring.call_fd, os.eventfd(0, os.EFD_NONBLOCK)
            front_end.connection.tell_u64(Request.SET_VRING_CALL, 0, [ring.call_fd])
            os.close(old)
            front_end.write(i, data(512))


def test_one_front_end_after_the_other(serve: Serve, path: str) -> None:
    """A second one waits for the first to leave."""
    serve()
    first = FrontEnd.connect(path)
    waiting = Connection(path, timeout=0.2)
    waiting.send(Request.GET_FEATURES)
    with pytest.raises(TimeoutError):
        waiting.receive()
    first.write(0, data(512))
    first.close()
    waiting.socket.settimeout(10)
    assert waiting.receive()[0] == Request.GET_FEATURES
    waiting.close()
    for i in range(50):
        with FrontEnd.connect(path) as front_end:
            assert front_end.read(0, 512) == data(512), i


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"logical-block-size": 513}, "'logical-block-size' must be a power of two"),
        ({"logical-block-size": 256}, "'logical-block-size' must be a power of two"),
        ({"num-queues": 0}, "'num-queues' must be from 1 to 256"),
        ({"num-queues": 257}, "'num-queues' must be from 1 to 256"),
        ({"serial": "x" * 21}, "'serial' must be at most 20"),
    ],
)
def test_bad_options(path: str, options: dict[str, Any], text: str) -> None:
    from target.config.options import Notation
    from target.exports.base import parse_export
    from target.exports.vhost_user_blk.export import VhostUserBlkExport
    from target.graph.errors import BlockError

    given = {"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": path}}
    kind, parsed = parse_export(given | options, Notation.JSON)
    assert kind is VhostUserBlkExport
    with pytest.raises(BlockError, match=f"export 'e': option {text}"):
        asyncio.run(_make(kind, parsed))


async def _make(kind: Any, parsed: Any) -> None:
    from types import SimpleNamespace

    kind(parsed, SimpleNamespace(size=SIZE), SimpleNamespace(), [0], None)
