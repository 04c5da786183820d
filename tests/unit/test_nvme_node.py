# SPDX-License-Identifier: Apache-2.0
"""The NVMe driver on a controller in memory: set-up, I/O, a controller that stalls or breaks, and the end."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from target.drivers.protocol.nvme import controller as nvme_controller
from target.drivers.protocol.nvme import recovery
from target.drivers.protocol.nvme.spec import IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE, Admin
from target.graph.errors import BlockError
from target.peers.nbd_client import NbdClient
from target.peers.nvme_controller import NvmeController
from tests.support.nvme import Rig, rig

MIB = 1 << 20


@pytest.fixture
def controller() -> NvmeController:
    return NvmeController(bytearray(8 * MIB), timeout=1)  # half a second


@pytest.fixture
async def rigged(monkeypatch: pytest.MonkeyPatch, controller: NvmeController) -> AsyncIterator[Rig]:
    monkeypatch.setattr(recovery, "TRY_AGAIN", 0.2)
    monkeypatch.setattr(nvme_controller, "GRACE", 0.5)
    async with rig(monkeypatch, controller) as made:
        yield made


async def until(reached: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def refused(rigged: Rig, seconds: float = 6, **options: object) -> str:
    begun = time.monotonic()
    with pytest.raises(BlockError) as caught:
        await rigged.open(**options)
    assert time.monotonic() - begun < seconds
    text = str(caught.value)
    assert text.startswith("node 'disk': ")
    return text


# ---- what works ----


async def test_reads_and_writes(rigged: Rig) -> None:
    node = await rigged.open(discard="unmap")
    data = random.Random(1).randbytes(MIB)
    await node.write(512, data)
    assert await node.read(512, MIB) == data
    assert rigged.controller.disk[512 : 512 + MIB] == data
    await node.write(1000, b"odd bytes")
    assert rigged.controller.disk[990:1020] == data[478:488] + b"odd bytes" + data[497:508]
    await node.write_zeroes(4096, 65536)
    assert await node.read(4096, 65536) == bytes(65536)
    await node.discard(512 << 10, 128 << 10)
    assert rigged.controller.disk[512 << 10 : 640 << 10] == bytes(128 << 10)
    await node.flush()
    opcodes = {opcode for queue, opcode in rigged.controller.seen if queue}
    assert opcodes == {0x00, 0x01, 0x02, 0x08, 0x09}


async def test_blocks_of_4096_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = NvmeController(bytearray(4 * MIB), 4096)
    async with rig(monkeypatch, controller) as rigged:
        node = await rigged.open()
        await node.write(0, b"\x11" * 16384)
        await node.write(4000, b"\x22" * 200)
        assert controller.disk[3990:4210] == b"\x11" * 10 + b"\x22" * 200 + b"\x11" * 10


async def test_says_who_the_controller_is(rigged: Rig) -> None:
    counters = (await rigged.open()).counters()
    assert counters["controller"]["model"] == "Mock Controller"
    assert counters["controller"]["serial"] == "MOCK0001"
    assert counters["controller"]["firmware"] == "1.0"
    assert counters["controller"]["subsystem"] == "nqn.2014-08.test:mock"
    assert counters["namespace"]["size"] == 8 * MIB
    assert counters["namespace"]["block-size"] == 512


@pytest.mark.parametrize(
    "option, threads, allowed, queues", [(0, 3, 8, 3), (2, 3, 8, 2), (0, 3, 1, 1), (9, 2, 8, 2)]
)
async def test_a_queue_for_each_thread(
    rigged: Rig, option: int, threads: int, allowed: int, queues: int
) -> None:
    for _ in range(threads - 1):
        rigged.service.datapath.add_thread()
    rigged.controller.max_queues = allowed
    node = await rigged.open(queues=option)
    assert node.counters()["queues"]["number"] == queues
    created = [opcode for queue, opcode in rigged.controller.seen if opcode == Admin.CREATE_SQ and not queue]
    assert len(created) == queues


@pytest.mark.parametrize("limit", [0, 1 << 30])
async def test_buffers_of_nbd_are_mapped_up_to_a_limit(rigged: Rig, scratch: Path, limit: int) -> None:
    """The device reaches the buffers of NBD connections itself, once they are mapped."""
    node = await rigged.open(**{"dma-limit": limit})
    address = str(scratch / "nbd.sock")
    await rigged.serve(address)
    client = await NbdClient.connect(address, "disk")
    data = random.Random(2).randbytes(4 * MIB)
    for at in range(0, len(data), 256 << 10):
        await client.write(at, data[at : at + (256 << 10)])
        assert await client.read(at, 256 << 10) == data[at : at + (256 << 10)]
    assert rigged.controller.disk[: 4 * MIB] == data
    counters = node.counters()
    assert (counters["queues"]["direct-bytes"] > 4 * MIB) == bool(limit)
    assert (counters["dma"]["mapped-bytes"] > 0) == bool(limit)
    await client.close()


@pytest.mark.parametrize("vectors, queues", [(1, 1), (2, 1), (3, 2)])
async def test_few_interrupts(rigged: Rig, vectors: int, queues: int) -> None:
    for _ in range(3):
        rigged.service.datapath.add_thread()
    rigged.controller.vectors = vectors
    node = await rigged.open()
    assert node.counters()["queues"]["number"] == queues
    await node.write(0, b"\x44" * 8192)
    assert await node.read(4096, 4096) == b"\x44" * 4096


async def test_leaves_the_controller_shut_down(rigged: Rig) -> None:
    node = await rigged.open()
    await node.write(0, b"\x33" * 512)
    await until(lambda: rigged.controller.events_asked > 0)
    seen = rigged.controller.seen
    begun = len(seen)
    assert not await rigged.close()
    assert [opcode for queue, opcode in seen[begun:] if queue] == [0x00], "no flush at the end"
    assert [opcode for queue, opcode in seen[begun:] if not queue] == [Admin.DELETE_SQ, Admin.DELETE_CQ]
    await until(lambda: not rigged.controller.enabled)
    assert rigged.controller.shut_downs == 1


async def test_namespace_that_grows(rigged: Rig) -> None:
    node = await rigged.open()
    controller = rigged.controller
    await until(lambda: controller.events_asked > 0)
    controller.disk.extend(bytes(MIB))
    controller.put(controller.namespace, IDENTIFY_NAMESPACE, nsze=9 * MIB // 512)
    assert controller.notify(4 << 16 | 0 << 8 | 2)
    await until(lambda: node.size == 9 * MIB)
    await node.write(8 * MIB, b"new")
    assert controller.disk[8 * MIB : 8 * MIB + 3] == b"new"
    await until(lambda: controller.events_asked == 1)


async def test_write_protected_namespace(rigged: Rig) -> None:
    rigged.controller.put(rigged.controller.namespace, IDENTIFY_NAMESPACE, nsattr=1)
    assert "write protected" in await refused(rigged)
    node = await rigged.open(**{"auto-read-only": True})
    assert node.read_only
    assert await node.read(0, 512) == bytes(512)


async def test_resize_is_refused(rigged: Rig) -> None:
    node = await rigged.open()
    with pytest.raises(BlockError, match="node 'disk': Cannot resize device files"):
        await rigged.service.graph.resize(node, 16 * MIB)


# ---- what is refused ----


async def test_options_that_make_no_sense(rigged: Rig) -> None:
    wrong: dict[str, list[int]] = {
        "namespace": [0, 1 << 32],
        "queues": [17],
        "timeout": [0, 3601],
        "force-share": [True],
    }
    for option, values in wrong.items():
        for value in values:
            assert option in await refused(rigged, **{option: value})
    await rigged.open()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("never_ready", "did not become ready within 1 s"),
        ("fatal", "fatal status"),
        ("gone", "does not answer"),
    ],
)
async def test_controller_that_does_not_start(rigged: Rig, fault: str, words: str) -> None:
    setattr(rigged.controller.faults, fault, True)
    await asyncio.sleep(0.05)
    assert words in await refused(rigged)


async def test_controller_that_does_not_identify(rigged: Rig) -> None:
    rigged.controller.faults.silent.add(Admin.IDENTIFY)
    assert "Identify controller: no completion after 1 s" in await refused(rigged, timeout=1)
    rigged.controller.faults.silent.clear()
    await rigged.open()


async def test_completion_that_fits_no_command(rigged: Rig) -> None:
    rigged.controller.faults.wrong_identifier = 999
    assert "completed a command 999 that is not in flight" in await refused(rigged)


@pytest.mark.parametrize("opcode", [Admin.IDENTIFY, Admin.SET_FEATURES, Admin.CREATE_CQ, Admin.CREATE_SQ])
async def test_admin_command_that_fails(rigged: Rig, opcode: Admin) -> None:
    rigged.controller.faults.status[opcode] = 0x006
    assert "internal error (0x006)" in await refused(rigged)


@pytest.mark.parametrize(
    "cap, words",
    [
        ({"stride": 12}, "do not lie in BAR 0"),
        ({"entries": 0}, "less than two entries"),
        ({"page_min": 1}, "pages of at least 8192 bytes"),
        ({"sets": 0}, "NVM command set"),
    ],
)
async def test_capabilities_that_will_not_do(rigged: Rig, cap: dict[str, int], words: str) -> None:
    rigged.controller.set_capabilities(**cap)
    assert words in await refused(rigged)


async def test_events_without_end(rigged: Rig) -> None:
    """They do not keep the node from its work."""
    node = await rigged.open()
    for _ in range(20):
        rigged.controller.notify(2 << 16 | 2)
        await node.write(0, b"x" * 512)
    assert rigged.controller.disk[:512] == b"x" * 512


async def test_namespaces_that_cannot_be_used(rigged: Rig) -> None:
    controller = rigged.controller
    assert "namespace 5 does not exist: the controller has up to 4" in await refused(rigged, namespace=5)
    assert "namespace 2 does not exist or is not active" in await refused(rigged, namespace=2)
    controller.set_format(9, metadata=8)
    assert "8 bytes of metadata" in await refused(rigged)
    controller.set_format(13)
    assert "blocks of 2^13 bytes" in await refused(rigged)
    controller.set_format(9)
    controller.command_set = 2
    assert "command set 2 (zoned)" in await refused(rigged)
    controller.command_set = 0
    controller.put(controller.controller, IDENTIFY_CONTROLLER, sqes=0x77)
    assert "queue entries" in await refused(rigged)
    controller.put(controller.controller, IDENTIFY_CONTROLLER, sqes=0x66)
    await rigged.open()


# ---- what goes wrong later ----


async def test_aborts_what_is_stuck(rigged: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """An aborted command fails or is tried again, but ends; the controller goes on without a reset."""
    node = await rigged.open(timeout=1)
    rigged.controller.faults.stalled = True
    read = asyncio.ensure_future(node.read(0, 4096))
    await until(lambda: (0, Admin.ABORT) in rigged.controller.seen)
    rigged.controller.faults.stalled = False
    try:
        assert await asyncio.wait_for(read, 10) == bytes(4096)
    except OSError as error:
        assert error.errno == errno.EIO
    assert await node.read(0, 512) == bytes(512)
    counters = node.counters()["queues"]
    assert counters["aborted"] == 1 and counters["controller-resets"] == 0
    assert "takes too long and is aborted" in caplog.text


async def test_resets_a_controller_that_does_not_abort(rigged: Rig) -> None:
    node = await rigged.open(timeout=1)
    faults = rigged.controller.faults
    faults.stalled, faults.aborts = True, False
    data = [bytes([i]) * 4096 for i in range(1, 9)]
    writes = [asyncio.ensure_future(node.write(i * 8192, piece)) for i, piece in enumerate(data)]
    await until(lambda: rigged.controller.resets >= 1)
    faults.stalled = False
    await asyncio.wait_for(asyncio.gather(*writes), 10)
    for i, piece in enumerate(data):
        assert rigged.controller.disk[i * 8192 : i * 8192 + 4096] == piece
    counters = node.counters()["queues"]
    assert counters["controller-resets"] == 1 and counters["resubmitted"] == 8


async def test_a_controller_that_stays_stuck_fails_its_requests(rigged: Rig) -> None:
    node = await rigged.open(timeout=1)
    faults = rigged.controller.faults
    faults.stalled, faults.aborts = True, False
    with pytest.raises(OSError) as caught:
        await asyncio.wait_for(node.read(0, 4096), 30)
    assert caught.value.errno == errno.EIO
    faults.stalled = False
    assert await asyncio.wait_for(node.read(0, 4096), 10) == bytes(4096)


async def test_a_reset_that_fails_is_tried_again(rigged: Rig, caplog: pytest.LogCaptureFixture) -> None:
    node = await rigged.open(timeout=1)
    faults = rigged.controller.faults
    faults.stalled, faults.aborts, faults.never_ready = True, False, True
    with pytest.raises(OSError) as caught:
        await asyncio.wait_for(node.read(0, 4096), 20)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        await asyncio.wait_for(node.read(0, 4096), 1)  # at once, while there is no controller
    assert "the reset failed: the controller did not become ready" in caplog.text
    faults.stalled = faults.never_ready = False
    await until(lambda: not node.counters()["queues"]["resetting"], 20)
    assert await node.read(0, 4096) == bytes(4096)
    assert node.counters()["queues"]["failed-resets"] >= 1
    assert "works again" in caplog.text


async def test_abort_that_is_not_answered_resets(rigged: Rig) -> None:
    node = await rigged.open(timeout=1)
    faults = rigged.controller.faults
    faults.stalled = True
    faults.silent.add(Admin.ABORT)
    read = asyncio.ensure_future(node.read(0, 4096))
    await until(lambda: rigged.controller.resets >= 1)
    faults.stalled = False
    assert await asyncio.wait_for(read, 10) == bytes(4096)


def hang(controller: NvmeController, **faults: bool) -> None:
    """I/O commands stay in the controller, and so does it in what it does."""
    controller.faults.stalled = controller.faults.never_stops = True
    controller.faults.aborts = False
    for name, value in faults.items():
        setattr(controller.faults, name, value)


@pytest.mark.parametrize("fault", ["reset_refused", "reset_useless"])
async def test_no_buffer_is_released_while_a_controller_that_does_not_stop_can_write_to_it(
    rigged: Rig, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The command that hung is done after its request has failed: it reaches nothing."""
    node = await rigged.open(timeout=1)
    controller = rigged.controller
    hang(controller, **{fault: True})
    read = asyncio.ensure_future(node.read(0, 4096))
    await asyncio.wait([read], timeout=20)
    assert not controller.bus_master, "the controller may still write to memory"
    assert isinstance(read.exception(), OSError) and controller.enabled
    controller.faults.stalled = False
    await until(lambda: controller.lost == 1)
    assert controller.late == 0
    assert "the reset failed: the controller did not stop within 1 s" in caplog.text
    controller.faults.never_stops = False
    await until(lambda: not node.counters()["queues"]["resetting"], 20)
    await node.write(0, b"again" * 100)
    assert await node.read(0, 500) == b"again" * 100


async def test_a_controller_that_does_not_stop_is_reset_as_a_function(rigged: Rig) -> None:
    """What was in flight is done again, and does not fail."""
    node = await rigged.open(timeout=1)
    controller = rigged.controller
    hang(controller)
    write = asyncio.ensure_future(node.write(0, b"x" * 4096))
    await until(lambda: controller.function_resets == 1)
    controller.faults.stalled = False
    await asyncio.wait_for(write, 10)
    assert controller.disk[:4096] == b"x" * 4096
    assert controller.bus_master and controller.late == controller.lost == 0


async def test_requests_wait_while_a_controller_cannot_be_stopped_at_all(
    rigged: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """It writes to their memory late, which is still theirs."""
    node = await rigged.open(timeout=1)
    controller = rigged.controller
    controller.disk[:4096] = b"y" * 4096
    hang(controller, reset_refused=True, always_master=True)
    read = asyncio.ensure_future(node.read(0, 4096))
    await until(lambda: "cannot be stopped" in caplog.text, 20)
    controller.faults.stalled = False
    await until(lambda: controller.late == 1)
    assert not read.done()
    controller.faults.never_stops = False
    assert await asyncio.wait_for(read, 10) == b"y" * 4096


async def test_ends_while_a_controller_cannot_be_stopped_at_all(
    rigged: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    node = await rigged.open(timeout=1)
    hang(rigged.controller, reset_useless=True, always_master=True)
    read = asyncio.ensure_future(node.read(0, 4096))
    await until(lambda: "cannot be stopped" in caplog.text, 20)
    begun = time.monotonic()
    await rigged.close()
    assert time.monotonic() - begun < 10
    assert isinstance(read.exception(), OSError)
    assert "it is given up" in caplog.text


async def test_memory_stays_until_a_controller_that_ignores_its_end_is_stopped(rigged: Rig) -> None:
    """It neither shuts down nor stops: the hardware asserts that it is harmless when memory goes."""
    node = await rigged.open(timeout=1)
    await node.write(0, b"x" * 512)
    hang(rigged.controller, never_shuts_down=True, reset_refused=True)
    rigged.controller.faults.stalled = False
    begun = time.monotonic()
    await rigged.close()
    assert time.monotonic() - begun < 10
    assert rigged.controller.enabled and not rigged.controller.bus_master


@pytest.mark.parametrize("turns", range(6))
async def test_a_close_in_the_midst_of_a_quiesce(rigged: Rig, turns: int) -> None:
    """The rig says when the datapath is told to stop while it quiesces."""
    for _ in range(2):
        rigged.service.datapath.add_thread()
    node = await rigged.open(**{"read-only": True})
    assert node.recovery is not None
    node.recovery.reset("a test")
    for _ in range(turns):
        await asyncio.sleep(0)
    await node.recovery.close()
    assert not await rigged.close()


async def test_ends_while_the_controller_is_gone(rigged: Rig) -> None:
    """A drive that was pulled: requests fail, and the target ends within a bounded time."""
    node = await rigged.open(timeout=1)
    rigged.controller.faults.gone = True
    with pytest.raises(OSError) as caught:
        await asyncio.wait_for(node.read(0, 4096), 20)
    assert caught.value.errno == errno.EIO
    begun = time.monotonic()
    await rigged.close()
    assert time.monotonic() - begun < 10


def log_error(controller: NvmeController) -> None:
    """Section 5.14.1.1: error count, queue, command, status with phase, parameter, LBA."""
    entry = (7).to_bytes(8, "little") + bytes([1, 0, 5, 0]) + (0x281 << 1).to_bytes(2, "little") + bytes(2)
    controller.errors[: len(entry) + 8] = entry + (1234).to_bytes(8, "little")


LOGGED = "node 'disk': error 7: unrecovered read error (0x281), queue 1, LBA 1234"


async def test_error_log_is_read_when_a_command_fails(rigged: Rig, caplog: pytest.LogCaptureFixture) -> None:
    node = await rigged.open()
    log_error(rigged.controller)
    rigged.controller.faults.failing[0x02] = 0x281
    for _ in range(20):
        with pytest.raises(OSError) as caught:
            await node.read(0, 4096)
        assert caught.value.errno == errno.EIO
    await until(lambda: LOGGED in caplog.text)
    assert "node 'disk': a command in queue 1 failed: unrecovered read error (0x281)" in caplog.text
    assert len(caplog.records) <= 4, "a flood of messages"
    rigged.controller.faults.failing.clear()
    assert await node.read(0, 4096) == bytes(4096)


async def test_error_log_is_read_when_the_controller_says_so(
    rigged: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rigged.open()
    await until(lambda: rigged.controller.events_asked > 0)
    log_error(rigged.controller)
    assert rigged.controller.notify(1 << 16 | 0)
    await until(lambda: LOGGED in caplog.text)
