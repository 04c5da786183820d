# SPDX-License-Identifier: Apache-2.0
"""Lines of the list of hostile front ends on real images, beside a bystander: ranges, a read-only device,
owners and second front ends, notifications that are missing, and the large numbers of the list."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.device import Feature
from target.exports.vhost_user_blk.messages import Request
from target.peers.vhost_user_front_end import (
    DISCARD,
    IOERR,
    OK,
    OUT,
    SEGMENT,
    UNSUPP,
    WRITE_ZEROES,
    Buffer,
    Closed,
    Connection,
    FrontEnd,
)
from tests.support.daemon import Daemon, blockdev, vhost_user_export
from tests.support.tools import check_image, create_image
from tests.support.vhost_victim import SIZE, Case, Victim

SECTORS = SIZE // 512
UNLIMITED = 0xFFFFFFFF
BAD_RANGES = [
    (b"", IOERR),
    (bytes(15), IOERR),
    (bytes(17), IOERR),
    (SEGMENT.pack(0, 8, 0) * 33, IOERR),
    (SEGMENT.pack(0, UNLIMITED, 0), IOERR),
    (SEGMENT.pack(SECTORS - 1, 2, 0), IOERR),
    (SEGMENT.pack((1 << 64) - 1, 1, 0), IOERR),
    (SEGMENT.pack(0, 8, 2), UNSUPP),
    (SEGMENT.pack(0, 8, UNLIMITED), UNSUPP),
    (SEGMENT.pack(0, 8, 0) + SEGMENT.pack(SECTORS, 1, 0), IOERR),
]


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_20_ranges(victim: Victim, kind: int) -> None:
    with victim.connect() as front_end:
        for payload, status in BAD_RANGES:
            assert front_end.request(kind, out=payload)[0] == status, payload
        assert front_end.read(0, 512) == b"sector 0".ljust(512)
        front_end.write(64, b"x" * 4096)
        assert front_end.request(kind, out=SEGMENT.pack(3, 0, 0) + SEGMENT.pack(64, 8, 0))[0] == OK
        if kind == WRITE_ZEROES:
            assert front_end.read(64, 4096) == bytes(4096)


@pytest.fixture(params=["raw", "qcow2"])
def read_only(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A read-only export of an image with data: the image, and the socket."""
    with TemporaryDirectory(prefix="bt-") as name:
        image, socket = create_image(Path(name) / "disk", str(SIZE), format=request.param), Path(name) / "v"
        file = {"driver": "file", "filename": str(image)}
        node = blockdev(driver=request.param, node_name="disk", read_only=True, file=file)
        daemon = Daemon(*node, *vhost_user_export(socket, writable=False)).wait_ready()
        yield image, str(socket)
        daemon.stop()
        if request.param == "qcow2":
            check_image(image)


def test_22_write_to_a_read_only_device(read_only: tuple[Path, str]) -> None:
    """With the feature bit that says so refused by the driver, too."""
    image, socket = read_only
    before = image.read_bytes()
    for features in (-1, ~Feature.RO):
        with FrontEnd.connect(socket, features=features) as front_end:
            assert front_end.request(OUT, 0, b"w" * 4096)[0] == IOERR
            for kind in (DISCARD, WRITE_ZEROES):
                assert front_end.request(kind, out=SEGMENT.pack(0, 8, 0))[0] in (IOERR, UNSUPP)
            assert front_end.read(0, 4096) == bytes(4096)
    assert image.read_bytes() == before


def fill(case: Case, count: int) -> None:
    """Requests in flight."""
    for _ in range(count):
        case.ring.add([Buffer(case.header, 16), Buffer(case.data, 4096, True), Buffer(case.status, 1, True)])
    case.ring.kick()


def test_31_owner_taken_and_given_back_in_mid_request(victim: Victim) -> None:
    for count in (0, 1, 40):
        with victim.connect() as front_end:
            case = Case(front_end)
            fill(case, count)
            front_end.connection.tell(Request.SET_OWNER)
            front_end.connection.tell(Request.RESET_OWNER)
            assert len(case.ring.take_used()) == count or front_end.stop_queue(0) >= 0


@pytest.mark.parametrize("size", [0, 24, 64])
def test_32_inflight_buffers_that_make_no_sense(victim: Victim, size: int) -> None:
    """GET_INFLIGHT_FD (31) and SET_INFLIGHT_FD (32), with numbers from nowhere."""
    for request in (31, 32):
        with victim.connect() as front_end:
            payload = random.Random(size).randbytes(size)
            fds = [front_end.memory.fd] if request == 32 else []
            try:
                front_end.connection.send(request, payload, fds, messages.VERSION | messages.NEED_REPLY)
                front_end.connection.receive()
            except Closed:
                continue
            assert front_end.read(0, 512) == b"sector 0".ljust(512)


def leave_often(victim: Victim, times: int) -> None:
    for i in range(times):
        front_end = victim.connect(queues=1 + i % 2)
        fill(Case(front_end), i % 40)
        front_end.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_33_a_thousand_front_ends_leave_in_mid_request(victim: Victim) -> None:
    leave_often(victim, 1000)


def test_34_second_front_end_while_one_is_connected(victim: Victim) -> None:
    """It waits, whatever it sends; the first one goes on."""
    with victim.connect() as front_end:
        others = [Connection(victim.path) for _ in range(5)]
        for other in others:
            other.send_raw(b"\xff" * 200)
        for _ in range(50):
            assert front_end.read(0, 512) == b"sector 0".ljust(512)
        for other in others:
            other.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_35_a_million_kicks(victim: Victim) -> None:
    with victim.connect() as front_end:
        for _ in range(1_000_000):
            front_end.rings[0].kick()
        assert front_end.read(0, 512) == b"sector 0".ljust(512)


def test_36_no_call_descriptor(victim: Victim) -> None:
    """Nobody is notified, and the requests are done."""
    with victim.connect() as front_end:
        front_end.connection.tell_u64(Request.SET_VRING_CALL, messages.VRING_NO_FD)
        case = Case(front_end)
        fill(case, 30)
        until, done = time.monotonic() + 10, 0
        while done < 30:
            assert time.monotonic() < until
            done += len(case.ring.take_used())
