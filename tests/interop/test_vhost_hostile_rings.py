# SPDX-License-Identifier: Apache-2.0
"""Guests whose rings and requests break the rules: their queue stops, and nothing else does.

After each test the target still runs, serves the next front end of the same export, has served a bystander on
another export without a pause, and holds no more descriptors than before.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.device import Feature
from target.exports.vhost_user_blk.messages import Request
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
    FrontEnd,
    GuestMemory,
    Refusal,
    Ring,
)
from tests.support.vhost import Target
from tests.support.vhost_victim import SIZE, Case, Victim

UNLIMITED = 0xFFFFFFFF


# ---- rings ----


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


def test_09_data_over_two_regions(victim: Victim) -> None:
    """Legal: what is contiguous for the guest, in two files here, may be one buffer. A gap may not."""
    low, high = GuestMemory(4 << 20), GuestMemory(1 << 20, base=4 << 20)
    with victim.connect(memories=[low, high]) as front_end:
        case = Case(front_end)
        content = random.Random(9).randbytes(8192)
        at = (4 << 20) - 4096
        for kind, header in ((OUT, low.put(BLK_HEADER.pack(OUT, 0, 64))), (IN, case.header)):
            low.write(at, content[:4096] if kind == OUT else bytes(4096))
            high.write(4 << 20, content[4096:] if kind == OUT else bytes(4096))
            low.write(header, BLK_HEADER.pack(kind, 0, 64))
            data = Buffer(at, 8192, kind == IN)
            status, _ = case.chain(Buffer(header, 16), data, Buffer(case.status, 1, True))
            assert status == OK
        assert low.read(at, 4096) + high.read(4 << 20, 4096) == content
        assert front_end.read(64, 8192) == content
        low.write(case.status, bytes([UNTOUCHED]))
        case.ring.set_desc(0, case.header, 16, NEXT, 1)
        case.ring.set_desc(1, (5 << 20) - 512, 1024, NEXT | WRITE, 2)
        case.ring.set_desc(2, case.status, 1, WRITE)
        low.write(case.header, BLK_HEADER.pack(IN, 0, 0))
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
        front_end.stop_queue(0)  # whatever it has begun is completed
        begun = victim.counters()["exports"]["disk"]["session"]["requests"].get("read", 0)
        # Either it keeps up, or it saw the index run past the ring; nothing is begun that is not completed.
        assert begun == case.ring.used_idx() <= 2000


def test_16_in_flight_on_a_device_that_does_not_answer() -> None:
    """Not one more than the ring holds is begun."""
    with TemporaryDirectory(prefix="bt-") as directory:
        target = Target(Path(directory) / "s")
        try:
            target.call(target.hold())
            with FrontEnd.connect(f"{directory}/s", size=16) as front_end:
                ring, memory = front_end.rings[0], front_end.memory
                header, status = memory.put(BLK_HEADER.pack(IN, 0, 0)), memory.put(b"\xee")
                ring.set_desc(0, header, 16, NEXT, 1)
                ring.set_desc(1, memory.allocate(512), 512, NEXT | WRITE, 2)
                ring.set_desc(2, status, 1, WRITE)
                for taken in range(1, 17):
                    ring.expose(0)
                    ring.kick()
                    until = time.monotonic() + 10
                    while len(target.disk.seen) < taken:
                        assert time.monotonic() < until
                        time.sleep(0.001)
                ring.expose(0)
                ring.kick()
                assert ring.failed()
                assert len(target.disk.seen) == 16
                target.call(target.let_go())
                base = front_end.stop_queue(0)
                assert len(target.disk.seen) == ring.used_idx() == base == 16
        finally:
            target.close()


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
    with victim.connect(memories=[memory]) as front_end:
        case = Case(front_end)
        data = memory.allocate(1 << 30, 4096)
        for length, status in ((1 << 30, IOERR), (SIZE, OK)):
            head = case.ring.add(
                [Buffer(case.header, 16), Buffer(data, length, True), Buffer(case.status, 1, True)]
            )
            case.ring.notify()
            assert case.ring.wait_used()[0].head == head
            assert memory.read(case.status, 1)[0] == status
        assert memory.read(data, 8) == b"sector 0"
