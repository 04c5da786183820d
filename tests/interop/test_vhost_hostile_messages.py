# SPDX-License-Identifier: Apache-2.0
"""Front ends whose messages break the rules: their session ends, and nothing else does.

After each test the target still runs, serves the next front end of the same export, has served a bystander on
another export without a pause, and holds no more descriptors than before.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.messages import MemoryRegion, ProtocolFeature, Request
from target.peers.vhost_user_front_end import (
    IN,
    NEXT,
    WRITE,
    Buffer,
    Closed,
    Connection,
    FrontEnd,
    GuestMemory,
    Refusal,
    Ring,
)
from tests.support.vhost_victim import QUEUES, Case, Victim

UNLIMITED = 0xFFFFFFFF


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x11, 0x80000001])
def test_24_bad_version_or_flags(victim: Victim, flags: int) -> None:
    c = Connection(victim.path)
    c.send(Request.GET_FEATURES, flags=flags)
    victim.ends(c)
    c.close()


@pytest.mark.parametrize(
    "data",
    [
        messages.HEADER.pack(Request.SET_FEATURES, 1, 65536) + bytes(4096),
        messages.HEADER.pack(Request.SET_FEATURES, 1, UNLIMITED),
        messages.HEADER.pack(Request.SET_FEATURES, 1, 4) + bytes(4),
        messages.HEADER.pack(Request.GET_FEATURES, 1, 8) + bytes(8),
        messages.HEADER.pack(Request.SET_VRING_ADDR, 1, 8) + bytes(8),
        bytes(12),
        b"\xff" * 64,
        b"GET / HTTP/1.0\r\n\r\n",
    ],
    ids=["64 KiB", "4 GiB", "short", "long", "address", "zeros", "ones", "http"],
)
def test_25_bad_sizes(victim: Victim, data: bytes) -> None:
    c = Connection(victim.path)
    c.send_raw(data)
    victim.ends(c)
    c.close()


@pytest.mark.parametrize("length", [1, 11, 12, 19])
def test_25_half_a_message(victim: Victim, length: int) -> None:
    for _ in range(20):
        c = Connection(victim.path)
        c.send_raw((messages.HEADER.pack(Request.SET_FEATURES, 1, 8) + bytes(8))[:length])
        c.close()


def test_25_random_bytes(victim: Victim) -> None:
    chance = random.Random(25)
    for _ in range(100):
        c = Connection(victim.path)
        try:
            for _ in range(20):
                payload = chance.randbytes(chance.choice([0, 4, 8, 40, 264]))
                c.send(chance.randrange(45), payload)
        except Closed:
            pass
        c.close()


PAGE = 4096


def table(victim: Victim, regions: list[MemoryRegion], fds: list[int]) -> None:
    """The table is refused, and the session lives or ends."""
    for protocol in (~ProtocolFeature.CONFIGURE_MEM_SLOTS, ~ProtocolFeature.REPLY_ACK):
        with FrontEnd(victim.path) as front_end:
            front_end.negotiate(protocol=protocol)
            with pytest.raises((Refusal, Closed)):
                front_end.set_table(regions, fds)
                assert not front_end.connection.acknowledged
                front_end.connection.ask_u64(Request.GET_FEATURES)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.truncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("count", [0, 9, 65535, UNLIMITED])
def test_26_number_of_regions(victim: Victim, memfd: int, count: int) -> None:
    with FrontEnd(victim.path) as front_end:
        front_end.negotiate()
        region = messages.REGION.pack(0, PAGE, 0, 0)
        payload = messages.MEMORY_HEADER.pack(count, 0) + region * min(count, 9)
        front_end.connection.send(Request.SET_MEM_TABLE, payload, [memfd] * min(count, 8))
        victim.ends(front_end.connection)


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 0, 0, 0)],
        [(0, 5 * PAGE, 0, 0)],
        [(0, PAGE, 0, 4 * PAGE)],
        [(0, PAGE, 0, (1 << 64) - PAGE)],
        [(0, (1 << 64) - PAGE, 0, PAGE)],
        [((1 << 64) - PAGE, 2 * PAGE, 0, 0)],
        [(0, 2 * PAGE, (1 << 64) - PAGE, 0)],
        [(0, 2 * PAGE, 0, 0), (PAGE, PAGE, PAGE, 0)],
        [(0, PAGE, 0, 0), (0, PAGE, PAGE, 0)],
    ],
    ids=["empty", "too long", "behind the end", "offset wraps", "size wraps", "guest address wraps",
         "user address wraps", "overlap", "twice"],
)  # fmt: skip
def test_26_bad_regions(victim: Victim, memfd: int, regions: list[tuple[int, int, int, int]]) -> None:
    table(victim, [MemoryRegion(*region) for region in regions], [memfd] * len(regions))


def test_26_descriptors_missing_or_too_many(victim: Victim, memfd: int) -> None:
    region = MemoryRegion(0, PAGE, 0, 0)
    table(victim, [region], [])
    table(victim, [region], [memfd, memfd])
    table(victim, [region._replace(guest_address=i * PAGE) for i in range(2)], [memfd])


def test_26_kinds_of_descriptors(victim: Victim) -> None:
    region = MemoryRegion(0, PAGE, 0, 0)
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    made = [
        reader, writer, os.eventfd(0), os.memfd_create("empty"), os.open("/", os.O_RDONLY),
        os.open("/dev/zero", os.O_RDWR), os.open("/proc/self/exe", os.O_RDONLY),
        ours.detach(), theirs.detach(),
    ]  # fmt: skip
    for fd in made:
        table(victim, [region], [fd])
        os.close(fd)


@pytest.mark.parametrize("keep", [0, 2 << 20], ids=["all of it", "the buffers"])
def test_26_memory_that_is_truncated_under_the_queue(victim: Victim, keep: int) -> None:
    """The thread that touches it gets SIGBUS; only this session ends."""
    for _ in range(5):
        memory = GuestMemory()
        with victim.connect(memories=[memory], queues=QUEUES) as front_end:
            case = Case(front_end)
            far = (3 << 20) if keep else case.header
            case.ring.set_desc(0, far, 16, NEXT, 1)
            case.ring.set_desc(1, case.data, 512, NEXT | WRITE, 2)
            case.ring.set_desc(2, case.status, 1, WRITE)
            # This side may not touch what is cut off either, but a queue that spins may be done before it is.
            if keep:
                os.ftruncate(memory.fd, keep)
                case.ring.expose(0)
            else:
                case.ring.expose(0)
                os.ftruncate(memory.fd, 0)
            case.ring.kick()
            victim.ends(front_end.connection, "the front end truncated the memory it shares")


def test_26_memory_that_is_truncated_before_the_queue_starts(victim: Victim) -> None:
    memory = GuestMemory()
    with FrontEnd(victim.path, [memory]) as front_end:
        front_end.negotiate()
        front_end.share_memory()
        ring = Ring(memory)
        front_end.rings.append(ring)
        os.ftruncate(memory.fd, 0)
        try:
            front_end.set_up(0, ring, 0)
        except Closed:
            return
        victim.ends(front_end.connection)


def test_27_memory_slots(victim: Victim, memfd: int) -> None:
    with FrontEnd(victim.path) as front_end:
        front_end.negotiate()
        slots = front_end.connection.ask_u64(Request.GET_MAX_MEM_SLOTS)
        for i in range(slots):
            front_end.add_region(MemoryRegion(i * PAGE, PAGE, i * PAGE, 0), memfd)
        with pytest.raises(Refusal):
            front_end.add_region(MemoryRegion(slots * PAGE, PAGE, 0, 0), memfd)
        with pytest.raises(Refusal):
            front_end.remove_region(MemoryRegion(0, 2 * PAGE, 0, 0))
        front_end.remove_region(MemoryRegion(0, PAGE, 0, 0), memfd)
        with pytest.raises(Refusal):
            front_end.remove_region(MemoryRegion(0, PAGE, 0, 0))
        front_end.add_region(MemoryRegion(slots * PAGE, PAGE, 0, 0), memfd)


def test_27_region_of_a_running_queue_is_removed(victim: Victim) -> None:
    """The queue cannot go on without its rings."""
    with victim.connect() as front_end:
        with pytest.raises(Refusal):
            front_end.remove_region(front_end.memory.region)
        front_end.rings[0].kick()
        front_end.share_memory()
        base = front_end.stop_queue(0)
        front_end.start_queue(0, base=base)
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


STATES = [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE, Request.GET_VRING_BASE]


@pytest.mark.parametrize("queue", [QUEUES, 255, 256, 1 << 31, UNLIMITED])
def test_28_queues_that_do_not_exist(victim: Victim, queue: int) -> None:
    for request in STATES:
        with FrontEnd(victim.path) as front_end:
            front_end.negotiate()
            with pytest.raises((Refusal, Closed)):
                front_end.connection.tell_state(request, queue, 1)
    if queue == messages.VRING_NO_FD:
        return  # names queue 0 in the messages that follow
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        with FrontEnd(victim.path) as front_end:
            front_end.negotiate()
            with pytest.raises((Refusal, Closed)):
                front_end.connection.tell_u64(request, queue | messages.VRING_NO_FD)


def test_28_before_the_memory(victim: Victim) -> None:
    with FrontEnd(victim.path) as front_end:
        front_end.negotiate()
        with pytest.raises(Refusal):
            front_end.start_queue(0)
        assert front_end.stop_queue(0) == 0


def test_28_while_it_runs(victim: Victim) -> None:
    with victim.connect() as front_end:
        c, ring = front_end.connection, front_end.rings[0]
        descriptor, used, available = ring.address
        with pytest.raises(Refusal):
            c.tell_state(Request.SET_VRING_NUM, 0, 64)
        with pytest.raises(Refusal):
            c.tell_state(Request.SET_VRING_BASE, 0, 5)
        with pytest.raises(Refusal):
            front_end.set_addresses(messages.VringAddress(0, 0, descriptor, used, available, 0))
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_28_kinds_of_descriptors(victim: Victim, request_: Request, tmp_path: Path) -> None:
    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    ours, theirs = socket.socketpair()
    with victim.connect() as front_end:
        for fd in (file, ours.fileno(), os.open("/dev/null", os.O_RDWR)):
            with pytest.raises(Refusal):
                front_end.connection.tell_u64(request_, 0, [fd])
        front_end.connection.send(request_, messages.U64.pack(0))
        victim.ends(front_end.connection)
    os.close(file)
    ours.close()
    theirs.close()


def test_28_pipes_that_close(victim: Victim) -> None:
    """A kick pipe without a writer, a call pipe without a reader."""
    with victim.connect() as front_end:
        reader, writer = os.pipe()
        front_end.connection.tell_u64(Request.SET_VRING_CALL, 0, [writer])
        os.close(reader)
        os.close(writer)
        case = Case(front_end)
        case.ring.add([Buffer(case.header, 16), Buffer(case.data, 512, True), Buffer(case.status, 1, True)])
        case.ring.kick()
        until = time.monotonic() + 10
        while not case.ring.take_used():
            assert time.monotonic() < until
        reader, writer = os.pipe()
        front_end.connection.tell_u64(Request.SET_VRING_KICK, 0, [reader])
        os.close(reader)
        os.close(writer)
        assert case.ring.failed()


def test_28_call_descriptor_that_is_full(victim: Victim) -> None:
    with victim.connect() as front_end:
        os.eventfd_write(front_end.rings[0].call_fd, 2**64 - 2)
        for _ in range(3):
            case = Case(front_end)
            case.ring.add(
                [Buffer(case.header, 16), Buffer(case.data, 512, True), Buffer(case.status, 1, True)]
            )
            case.ring.kick()
            until = time.monotonic() + 10
            while not case.ring.take_used():
                assert time.monotonic() < until


def test_28_call_descriptor_that_blocks(victim: Victim) -> None:
    """The front end owns the descriptor's flags too: the thread must come back, and others are served."""
    with victim.connect() as front_end:
        case = Case(front_end)
        os.set_blocking(case.ring.call_fd, True)
        os.eventfd_write(case.ring.call_fd, 2**64 - 2)
        case.ring.add([Buffer(case.header, 16), Buffer(case.data, 512, True), Buffer(case.status, 1, True)])
        case.ring.kick()
        assert case.ring.failed()


def test_28_kick_that_is_taken_away(victim: Victim) -> None:
    """KICK without a descriptor on a queue that runs: the queue is polled, until it gets one again."""
    with victim.connect() as front_end:
        case, ring = Case(front_end), front_end.rings[0]
        for fds in ([], [ring.kick_fd], []):
            front_end.connection.tell_u64(Request.SET_VRING_KICK, 0 if fds else messages.VRING_NO_FD, fds)
            for _ in range(3):
                head = ring.add(
                    [Buffer(case.header, 16), Buffer(case.data, 512, True), Buffer(case.status, 1, True)]
                )
                if fds:
                    ring.kick()
                until = time.monotonic() + 10
                while not (done := ring.take_used()):
                    assert time.monotonic() < until
                    time.sleep(0.001)
                assert [used.head for used in done] == [head]
                assert case.memory.read(case.data, 8) == b"sector 0"
                ring.reclaim(head)


def test_29_descriptors_that_nobody_wants(victim: Victim, memfd: int) -> None:
    for count in (1, 8, 9, 253):
        for request in (Request.GET_FEATURES, Request.SET_OWNER, Request.SET_VRING_NUM, 200):
            c = Connection(victim.path)
            c.send(request, fds=[memfd] * count)
            victim.ends(c)
            c.close()


def test_29_thousands_of_messages_with_descriptors(victim: Victim) -> None:
    with victim.connect() as front_end:
        ring = front_end.rings[0]
        for _ in range(10_000):
            front_end.connection.tell_u64(Request.SET_VRING_CALL, 0, [ring.call_fd])
        victim.settled(20)
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.mark.slow
def test_29_ten_thousand_descriptors_that_nobody_wants(victim: Victim, memfd: int) -> None:
    """Each one ends a session, and all of them together are a few lines of warnings."""
    begun = time.monotonic()
    requests = [Request.GET_FEATURES, Request.SET_OWNER, Request.GET_VRING_BASE, Request.GET_CONFIG, 200]
    for i in range(10_000):
        c = Connection(victim.path)
        c.send(requests[i % len(requests)], fds=[memfd])
        assert c.ended()
        c.close()
    victim.says("the session is ended")
    assert len(victim.log.new()) < 60 + 5 * (time.monotonic() - begun)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 257), (256, 1), (255, 2), (UNLIMITED, 1)])
def test_30_configuration_reads(victim: Victim, offset: int, size: int) -> None:
    with victim.connect() as front_end:
        assert front_end.get_config(offset, size) == b""
        assert len(front_end.get_config(0, 256)) == 256


@pytest.mark.parametrize(
    ("offset", "data"), [(0, bytes(8)), (32, b"\2"), (31, b"\0\1"), (32, b""), (UNLIMITED, b"\1")]
)
def test_30_configuration_writes(victim: Victim, offset: int, data: bytes) -> None:
    with victim.connect() as front_end:
        before = front_end.get_config()
        with pytest.raises(Refusal):
            front_end.set_config(offset, data)
        assert front_end.get_config() == before


def test_31_owner(victim: Victim) -> None:
    with victim.connect() as front_end:
        front_end.connection.tell(Request.SET_OWNER)
        front_end.connection.tell(Request.RESET_OWNER)
        front_end.connection.tell(Request.RESET_OWNER)
        assert front_end.stop_queue(0) == 0
        front_end.start_queue(0)
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.mark.parametrize("request_", [6, 7, 19, 20, 22, 23, 26, 28, 30, 31, 32, 33, 34, 35, 39, 40, 41, 1000])
def test_32_38_requests_that_were_not_offered(victim: Victim, request_: int) -> None:
    """In-flight buffers, logging, postcopy and the like: refused where an answer is due, else the end."""
    with victim.connect() as front_end:
        with pytest.raises(Refusal):
            front_end.connection.tell(request_, bytes(24))
        assert front_end.read(0, 512) == b"sector 0".ljust(512)
        front_end.connection.send(request_, bytes(24))
        victim.ends(front_end.connection)


def test_33_leaving_in_the_middle(victim: Victim) -> None:
    """With requests in flight, at any point, many times."""
    for i in range(200):
        front_end = victim.connect(queues=1 + i % QUEUES)
        case = Case(front_end, IN, 0)
        for _ in range(i % 40):
            case.ring.add(
                [Buffer(case.header, 16), Buffer(case.data, 4096, True), Buffer(case.status, 1, True)]
            )
        case.ring.kick()
        front_end.close()


# 34, a second front end: test_vhost_user_blk.py


def test_35_kicks_without_requests(victim: Victim) -> None:
    with victim.connect() as front_end:
        for _ in range(200_000):
            front_end.rings[0].kick()
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.mark.parametrize("bit", [0, 7, 8, 24, 26, 31, 33, 34, 35, 40, 63])
def test_37_features_that_were_not_offered(victim: Victim, bit: int) -> None:
    """24 is notify-on-empty, 26 logging, 33 the IOMMU, 34 the packed ring."""
    with FrontEnd(victim.path) as front_end:
        front_end.negotiate()
        with pytest.raises(Closed):
            front_end.set_features(front_end.features | 1 << bit)
    c = Connection(victim.path)
    c.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 12))
    victim.ends(c)
    c.close()


@pytest.mark.slow
def test_39_front_end_that_never_reads(victim: Victim) -> None:
    c = Connection(victim.path, timeout=15)
    begun = time.monotonic()
    with pytest.raises(Closed):
        while time.monotonic() < begun + 30:
            c.send(Request.GET_FEATURES)
    c.close()


def test_backend_channel_that_is_no_socket(victim: Victim, memfd: int) -> None:
    with victim.connect() as front_end:
        with pytest.raises(Refusal):
            front_end.connection.tell(Request.SET_BACKEND_REQ_FD, fds=[memfd])
        for _ in range(50):
            front_end.open_channel().close()
