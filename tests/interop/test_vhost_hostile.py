# SPDX-License-Identifier: Apache-2.0
"""Front ends that break the rules: their queue or session stops, and nothing else does.

After each test the target still runs, serves the next front end of the same export, has served a bystander on
another export without a pause, and holds no more descriptors than before.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.device import Feature
from target.exports.vhost_user_blk.messages import MemoryRegion, ProtocolFeature, Request
from target.peers.vhost_user_front_end import (
    BLK_HEADER,
    DESC,
    GET_ID,
    IN,
    INDIRECT,
    IOERR,
    NEXT,
    OK,
    OUT,
    UNSUPP,
    UNTOUCHED,
    WRITE,
    Buffer,
    Closed,
    Connection,
    FrontEnd,
    GuestMemory,
    PeerError,
    Refusal,
    Ring,
)
from tests.support.daemon import Daemon, blockdev
from tests.support.tools import create_image

SIZE = 16 << 20
QUEUES = 2
PAUSE = 3.0  # seconds; how long the bystander may wait for one request on a busy machine
UNLIMITED = 0xFFFFFFFF


class Bystander(threading.Thread):
    """Another client that reads and writes all the time and checks what it gets."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.longest = 0.0
        self.rounds = 0
        self.trouble: Exception | None = None
        self.leave = threading.Event()

    def run(self) -> None:
        try:
            with FrontEnd.connect(self.path) as front_end:
                while not self.leave.is_set():
                    self._round(front_end)
        except Exception as error:  # noqa: BLE001 - reported by the test
            self.trouble = error

    def _round(self, front_end: FrontEnd) -> None:
        content = random.randbytes(4096)
        begun = time.monotonic()
        front_end.write(8 * (self.rounds % 64), content)
        if front_end.read(8 * (self.rounds % 64), 4096) != content:
            raise PeerError("what was read is not what was written")
        self.longest = max(self.longest, time.monotonic() - begun)
        self.rounds += 1
        time.sleep(0.002)


class Victim:
    """The target with its two exports."""

    def __init__(self, directory: Path, format: str) -> None:
        self.path = str(directory / "hostile")
        other = str(directory / "other")
        argv = ["--object", "iothread,id=t0", "--object", "iothread,id=t1"]
        for name in ("disk", "bystander"):
            image = create_image(directory / name, str(SIZE), format=format)
            file = {"driver": "file", "filename": str(image)}
            argv += blockdev(driver=format, node_name=name, file=file)
        for node, path in (("disk", self.path), ("bystander", other)):
            where = f"addr.type=unix,addr.path={path}"
            threads = "iothread.0=t0,iothread.1=t1" if node == "disk" else "iothread=t0"
            argv += ["--export", f"type=vhost-user-blk,id={node},node-name={node},writable=on,"
                                 f"num-queues={QUEUES},{threads},{where}"]  # fmt: skip
        self.daemon = Daemon(*argv).wait_ready()
        self.bystander = Bystander(other)
        self.bystander.start()
        with self.connect() as front_end:
            front_end.write(0, b"sector 0".ljust(512))
        self.base = self.descriptors()

    def connect(self, queues: int = 1, size: int = 128, features: int = -1, protocol: int = -1) -> FrontEnd:
        return FrontEnd.connect(self.path, queues=queues, size=size, features=features, protocol=protocol)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def settled(self, more: int = 0) -> None:
        """No descriptors are held that were not at first, but for some of a session."""
        until = time.monotonic() + 5
        while (now := self.descriptors()) > self.base + more and time.monotonic() < until:
            time.sleep(0.01)
        assert now <= self.base + more, f"{now} descriptors, {self.base} at first"

    def check(self) -> None:
        """What must hold after every test."""
        assert self.daemon.process.poll() is None, self.daemon.output()
        with self.connect(queues=QUEUES) as front_end:
            for queue in range(QUEUES):
                assert front_end.read(0, 512, queue=queue) == b"sector 0".ljust(512)
        self.settled()
        if self.bystander.trouble is not None:
            raise self.bystander.trouble
        assert self.bystander.is_alive()
        assert self.bystander.longest < PAUSE

    def close(self) -> None:
        self.bystander.leave.set()
        self.bystander.join()
        self.daemon.stop()


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def running(request: pytest.FixtureRequest) -> Iterator[Victim]:
    with TemporaryDirectory(prefix="bt-") as directory:
        victim = Victim(Path(directory), request.param)
        yield victim
        victim.close()


@pytest.fixture
def victim(running: Victim) -> Iterator[Victim]:
    yield running
    running.check()


# ---- rings ----


class Case:
    """One queue with a header, a data buffer of 4 KiB and a status byte at hand."""

    def __init__(self, front_end: FrontEnd, kind: int = IN, sector: int = 0) -> None:
        self.front_end = front_end
        self.memory, self.ring = front_end.memory, front_end.rings[0]
        self.header = self.memory.put(BLK_HEADER.pack(kind, 0, sector))
        self.data = self.memory.allocate(4096, 512)
        self.status = self.memory.put(bytes([UNTOUCHED]))

    def go(self, head: int = 0) -> None:
        self.ring.expose(head)
        self.ring.kick()

    def chain(self, *buffers: Buffer) -> tuple[int, int]:
        """A well-formed chain; returns the status byte and the used length."""
        head = self.ring.add(buffers)
        self.ring.notify()
        (used,) = self.ring.wait_used()
        assert used.head == head
        return self.memory.read(self.status, 1)[0], used.length

    def stopped(self) -> None:
        """The queue stops with an error, nothing is completed, and it can be set up again."""
        assert self.ring.failed()
        assert self.ring.take_used() == []
        assert self.memory.read(self.status, 1)[0] == UNTOUCHED
        base = self.front_end.stop_queue(0)
        self.front_end.start_queue(0, base=base)
        assert self.front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.fixture
def case(victim: Victim) -> Iterator[Case]:
    with victim.connect() as front_end:
        yield Case(front_end)


def test_01_loop_of_two(case: Case) -> None:
    case.ring.set_desc(0, case.header, 16, NEXT, 1)
    case.ring.set_desc(1, case.header, 16, NEXT, 0)
    case.go()
    case.stopped()


def test_01_loop_of_empty_descriptors(case: Case) -> None:
    """CVE-2016-6490, CVE-2019-9547: it must not spin."""
    case.ring.set_desc(0, 0, 0, NEXT, 1)
    case.ring.set_desc(1, 0, 0, NEXT, 0)
    case.go()
    case.stopped()


def test_02_descriptor_that_follows_itself(case: Case) -> None:
    case.ring.set_desc(0, case.header, 16, NEXT, 0)
    case.go()
    case.stopped()


@pytest.mark.parametrize("follower", [128, 129, 0x8000, 0xFFFF])
def test_03_next_past_the_table(case: Case, follower: int) -> None:
    case.ring.set_desc(0, case.header, 16, NEXT, follower)
    case.go()
    case.stopped()


def test_04_chain_longer_than_the_queue(case: Case) -> None:
    table = b"".join(DESC.pack(case.header, 1, NEXT, i + 1) for i in range(2000))
    case.ring.set_desc(0, case.memory.put(table), len(table), INDIRECT)
    case.go()
    case.stopped()


@pytest.mark.parametrize("head", [128, 0x8000, 0xFFFF])
def test_05_head_past_the_table(case: Case, head: int) -> None:
    case.go(head)
    case.stopped()


@pytest.mark.parametrize("jump", [129, 0x7FFF, 0xFFFF], ids=["one too many", "half around", "back by one"])
def test_06_07_available_index_jumps(case: Case, jump: int) -> None:
    case.ring.set_avail_idx(case.ring.avail_idx + jump)
    case.ring.kick()
    case.stopped()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 1025, 0xFFFFFFF0])
def test_08_indirect_table_of_a_bad_length(case: Case, length: int) -> None:
    table = case.memory.put(bytes(16 * 2000))
    case.ring.set_desc(0, table, length, INDIRECT)
    case.go()
    case.stopped()


@pytest.mark.parametrize("kind", ["nested", "with next", "outside", "follower", "loop"])
def test_08_indirect_table_that_is_malformed(case: Case, kind: int) -> None:
    inner = {
        "nested": DESC.pack(case.header, 16, INDIRECT, 0),
        "follower": DESC.pack(case.header, 16, NEXT, 1),
        "loop": DESC.pack(case.header, 16, NEXT, 0),
    }.get(str(kind), DESC.pack(case.header, 16, 0, 0))
    address = 1 << 40 if str(kind) == "outside" else case.memory.put(inner)
    case.ring.set_desc(0, address, 16, INDIRECT | (NEXT if str(kind) == "with next" else 0), 1)
    case.ring.set_desc(1, case.status, 1, WRITE)
    case.go()
    case.stopped()


def test_08_indirect_that_was_not_negotiated(victim: Victim) -> None:
    with victim.connect(features=~Feature.RING_INDIRECT_DESC) as front_end:
        case = Case(front_end)
        table = DESC.pack(case.header, 16, NEXT, 1) + DESC.pack(case.status, 1, WRITE, 0)
        case.ring.set_desc(0, case.memory.put(table), len(table), INDIRECT)
        case.go()
        case.stopped()


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (1 << 40, 4096),
        ((4 << 20) - 512, 4096),
        ((1 << 64) - 512, 4096),
        ((1 << 64) - 1, 1),
        (0, UNLIMITED),
    ],
    ids=["unmapped", "past the end", "wraps", "the last byte", "4 GiB"],
)
@pytest.mark.parametrize("part", ["header", "data", "status"])
def test_09_bad_address(case: Case, address: int, length: int, part: str) -> None:
    header = (address, length) if part == "header" else (case.header, 16)
    data = (address, length) if part == "data" else (case.data, 4096)
    status = (address, length) if part == "status" else (case.status, 1)
    case.ring.set_desc(0, *header, NEXT, 1)
    case.ring.set_desc(1, *data, NEXT | WRITE, 2)
    case.ring.set_desc(2, *status, WRITE)
    case.go()
    case.stopped()


def test_10_header_in_sixteen_pieces(case: Case) -> None:
    """Legal (CVE-2022-2132 was an endless loop), and empty descriptors are passed over."""
    pieces = [Buffer(case.header + i, 1) for i in range(16)]
    empty = Buffer(case.header, 0)
    status, used = case.chain(
        empty, *pieces, empty, Buffer(case.data, 1024, True), Buffer(case.data + 1024, 3072, True),
        Buffer(0, 0, True), Buffer(case.status, 1, True),
    )  # fmt: skip
    assert (status, used) == (OK, 4097)
    assert case.memory.read(case.data, 8) == b"sector 0"


@pytest.mark.parametrize("lengths", [(0, 4096, 1), (15, 4096, 1)], ids=["empty header", "short header"])
def test_10_header_too_short(case: Case, lengths: tuple[int, int, int]) -> None:
    case.ring.set_desc(0, case.header, lengths[0], NEXT, 1)
    case.ring.set_desc(1, case.data, lengths[1], NEXT | WRITE, 2)
    case.ring.set_desc(2, case.status, lengths[2], WRITE)
    case.go()
    case.stopped()


def test_11_header_that_is_writable(case: Case) -> None:
    case.ring.set_desc(0, case.header, 16, NEXT | WRITE, 1)
    case.ring.set_desc(1, case.status, 1, WRITE)
    case.go()
    case.stopped()


def test_11_status_that_is_read_only(case: Case) -> None:
    case.ring.set_desc(0, case.header, 16, NEXT, 1)
    case.ring.set_desc(1, case.data, 512, NEXT | WRITE, 2)
    case.ring.set_desc(2, case.status, 1, 0)
    case.go()
    case.stopped()


def test_11_status_at_the_end_of_the_data(case: Case) -> None:
    """Legal: framing is free, the last writable byte is the status."""
    case.memory.write(case.data, bytes([UNTOUCHED]) * 4096)
    status, used = case.chain(Buffer(case.header, 16), Buffer(case.data, 513, True))
    assert used == 513
    assert case.memory.read(case.data, 514) == b"sector 0".ljust(512) + bytes([OK, UNTOUCHED])
    assert status == UNTOUCHED


@pytest.mark.parametrize("what", ["nothing", "no header", "empty status"])
def test_12_no_status(case: Case, what: str) -> None:
    if what == "nothing":
        case.ring.set_desc(0, case.header, 16)
    elif what == "no header":
        case.ring.set_desc(0, case.status, 1, WRITE)
    else:
        case.ring.set_desc(0, case.header, 16, NEXT, 1)
        case.ring.set_desc(1, case.status, 0, WRITE)
    case.go()
    case.stopped()


@pytest.mark.parametrize("part", ["descriptor", "used", "available"])
@pytest.mark.parametrize("value", [0, 1 << 63, (1 << 64) - 16, "unaligned", "at the end"])
def test_13_rings_at_bad_addresses(victim: Victim, part: str, value: int | str) -> None:
    with FrontEnd(victim.path) as front_end:
        front_end.negotiate()
        front_end.share_memory()
        ring = Ring(front_end.memory)
        front_end.rings.append(ring)
        good = dict(zip(("descriptor", "used", "available"), ring.address, strict=True))
        if value == "unaligned":
            bad = good[part] + 1
        elif value == "at the end":
            bad = good["descriptor"] - ring.desc + front_end.memory.size - 16
        else:
            bad = int(value)
        address = messages.VringAddress(queue=0, flags=0, log=0, **(good | {part: bad}))
        c = front_end.connection
        with pytest.raises(Refusal):
            c.tell_state(Request.SET_VRING_NUM, 0, ring.size)
            front_end.set_addresses(address)
            c.tell_u64(Request.SET_VRING_KICK, 0, [ring.kick_fd])
            c.tell_state(Request.SET_VRING_ENABLE, 0, 1)


def test_13_used_ring_over_the_descriptors(victim: Victim) -> None:
    with victim.connect() as front_end:
        front_end.stop_queue(0)
        ring = front_end.rings[0]
        ring.restart(0)
        ring.used = ring.desc
        front_end.set_up(0, ring, 0)
        case = Case(front_end)
        for _ in range(300):
            ring.set_desc(0, case.header, 16, NEXT, 1)
            ring.set_desc(1, case.data, 512, NEXT | WRITE, 2)
            ring.set_desc(2, case.status, 1, WRITE)
            case.go()


@pytest.mark.parametrize("size", [0, 3, 100, 2048, 32768, 65536, UNLIMITED])
def test_14_bad_queue_sizes(victim: Victim, size: int) -> None:
    with victim.connect() as front_end:
        front_end.stop_queue(0)
        with pytest.raises(Refusal):
            front_end.connection.tell_state(Request.SET_VRING_NUM, 0, size)


def test_14_queue_of_one(victim: Victim) -> None:
    with victim.connect(size=1) as front_end:
        assert front_end.request(IN, into=512, indirect=True)[::2] == (OK, 513)


def test_15_descriptors_that_change_while_they_are_read(victim: Victim) -> None:
    """A thread flips addresses, lengths and flags between good and bad ones."""
    leave = threading.Event()

    def flip(ring: Ring, good: list[bytes]) -> None:
        chance = random.Random(15)
        while not leave.is_set():
            for i, entry in enumerate(good):
                bad = DESC.pack(
                    chance.choice([1 << 40, 0]), chance.choice([UNLIMITED, 0]), chance.randrange(8), 99
                )
                ring.memory.write(ring.desc + 16 * i, bad)
                ring.memory.write(ring.desc + 16 * i, entry)

    for _ in range(20):
        with victim.connect() as front_end:
            case = Case(front_end)
            case.ring.set_desc(0, case.header, 16, NEXT, 1)
            case.ring.set_desc(1, case.data, 4096, NEXT | WRITE, 2)
            case.ring.set_desc(2, case.status, 1, WRITE)
            good = [case.memory.read(case.ring.desc + 16 * i, 16) for i in range(3)]
            leave.clear()
            thread = threading.Thread(target=flip, args=(case.ring, good))
            thread.start()
            try:
                for _ in range(100):
                    case.go()
            finally:
                leave.set()
                thread.join()


def test_16_more_in_flight_than_the_ring_holds(victim: Victim) -> None:
    """CVE-2016-5403: the same head again and again, past the ring's size."""
    with victim.connect(size=16) as front_end:
        case = Case(front_end)
        case.ring.set_desc(0, case.header, 16, NEXT, 1)
        case.ring.set_desc(1, case.data, 4096, NEXT | WRITE, 2)
        case.ring.set_desc(2, case.status, 1, WRITE)
        for _ in range(2000):
            case.go()
        # Either it keeps up, or it saw the index run past the ring; in flight are never more than it holds.
        assert case.ring.used_idx() <= case.ring.avail_idx or case.ring.failed(0)


# ---- requests ----


def refused(
    victim: Victim, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, *, status: int
) -> None:
    with victim.connect() as front_end:
        assert front_end.request(kind, sector, out, into)[0] == status
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 15, 100, 1 << 31, UNLIMITED])
def test_17_unknown_type(victim: Victim, kind: int) -> None:
    refused(victim, kind, into=512, status=UNSUPP)


@pytest.mark.parametrize("sector", [SIZE // 512, SIZE // 512 - 7, 1 << 32, 1 << 55, 1 << 63, (1 << 64) - 1])
def test_18_past_the_capacity(victim: Victim, sector: int) -> None:
    refused(victim, IN, sector, into=4096, status=IOERR)
    refused(victim, OUT, sector, bytes(4096), status=IOERR)


@pytest.mark.parametrize("length", [1, 511, 513, 4095])
def test_19_part_of_a_sector(victim: Victim, length: int) -> None:
    refused(victim, IN, into=length, status=IOERR)
    refused(victim, OUT, out=bytes(length), status=IOERR)


def test_19_no_data(victim: Victim) -> None:
    refused(victim, IN, status=OK)
    refused(victim, OUT, status=OK)


# 20, discard and write zeroes, and 22, a read-only device: test_vhost_user_blk.py


def test_21_serial_into_one_byte(victim: Victim) -> None:
    with victim.connect() as front_end:
        assert front_end.request(GET_ID, into=1) == (OK, b"d", 2)
        assert front_end.request(GET_ID) == (OK, b"", 1)


def test_23_large_requests(victim: Victim) -> None:
    """1 GiB in one descriptor is past the device's end; 16 MiB, the whole device, is not."""
    memory = GuestMemory((1 << 30) + (1 << 20))
    with FrontEnd.connect(victim.path, memories=[memory]) as front_end:
        case = Case(front_end)
        data = memory.allocate(1 << 29, 4096)
        for length, status in ((1 << 29, IOERR), (SIZE, OK)):
            head = case.ring.add(
                [Buffer(case.header, 16), Buffer(data, length, True), Buffer(case.status, 1, True)]
            )
            case.ring.notify()
            assert case.ring.wait_used()[0].head == head
            assert memory.read(case.status, 1)[0] == status
        assert memory.read(data, 8) == b"sector 0"


# ---- messages ----


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x11, 0x80000001])
def test_24_bad_version_or_flags(victim: Victim, flags: int) -> None:
    c = Connection(victim.path)
    c.send(Request.GET_FEATURES, flags=flags)
    assert c.ended()
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
    assert c.ended()
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
        assert front_end.connection.ended()


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
        with FrontEnd.connect(victim.path, memories=[memory], queues=QUEUES) as front_end:
            case = Case(front_end)
            far = (3 << 20) if keep else case.header
            case.ring.set_desc(0, far, 16, NEXT, 1)
            case.ring.set_desc(1, case.data, 512, NEXT | WRITE, 2)
            case.ring.set_desc(2, case.status, 1, WRITE)
            case.ring.expose(0)
            os.ftruncate(memory.fd, keep)
            case.ring.kick()  # from here on this side may not touch what was cut off either
            assert front_end.connection.ended()


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
        assert front_end.connection.ended()


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
        assert front_end.connection.ended()
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
    """The front end owns the descriptor's flags too: the thread must come back, and serve others meanwhile."""
    with victim.connect() as front_end:
        case = Case(front_end)
        os.set_blocking(case.ring.call_fd, True)
        os.eventfd_write(case.ring.call_fd, 2**64 - 2)
        case.ring.add([Buffer(case.header, 16), Buffer(case.data, 512, True), Buffer(case.status, 1, True)])
        case.ring.kick()
        assert case.ring.failed()


def test_29_descriptors_that_nobody_wants(victim: Victim, memfd: int) -> None:
    for count in (1, 8, 9, 253):
        for request in (Request.GET_FEATURES, Request.SET_OWNER, Request.SET_VRING_NUM, 200):
            c = Connection(victim.path)
            c.send(request, fds=[memfd] * count)
            assert c.ended()
            c.close()


def test_29_thousands_of_messages_with_descriptors(victim: Victim) -> None:
    with victim.connect() as front_end:
        ring = front_end.rings[0]
        for _ in range(3000):
            front_end.connection.tell_u64(Request.SET_VRING_CALL, 0, [ring.call_fd])
        victim.settled(20)
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


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
        assert front_end.connection.ended()


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
    assert c.ended()
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
