# SPDX-License-Identifier: Apache-2.0
"""The NVMe driver at work inside of a guest: `python3 -m tests.guest.inside.nvme good|stall|no-iommu`."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from target import drivers
from target.graph.errors import BlockError
from target.graph.registry import parse_blockdev
from target.peers.nbd_client import NbdClient
from target.peers.vhost_user_front_end import FrontEnd, GuestMemory
from target.service import Service
from target.vfio.bind import Binder
from target.vfio.errors import VfioError
from tests.guest.inside import load
from tests.guest.inside.daemon import Target, pci_address, refusal, result, run, say, vfio_bind

MIB = 1 << 20
NOBODY = 65534
SERIAL = "blocktarget-test"
SHOWN = {"model": "model", "serial": "serial", "firmware": "firmware_rev", "subsystem": "subsysnqn"}
ABSENT = "0000:00:1e.7"
PORT = 10809
SOCKET = "/tmp/vhost.sock"
VHOST_EXPORT = [
    "--export",
    f"type=vhost-user-blk,id=vhost,node-name=disk,writable=on,addr.type=unix,addr.path={SOCKET}",
]
NBD_SERVER = ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={PORT}"]


def options(address: str, **more: object) -> dict[str, object]:
    return {"driver": "nvme", "node-name": "disk", "device": address, "namespace": 1, **more}


def node(address: str, **more: object) -> list[str]:
    return ["--blockdev", json.dumps(options(address, **more))]


def export(*iothreads: str) -> list[str]:
    threads = "".join(f",iothread.{i}={name}" for i, name in enumerate(iothreads))
    return ["--export", f"type=nbd,id=nbd,node-name=disk,name=disk,writable=on{threads}"]


def iothreads(*names: str) -> list[str]:
    return [word for name in names for word in ("--object", f"iothread,id={name}")]


async def clients(count: int) -> list[NbdClient]:
    return [await NbdClient.connect(("127.0.0.1", PORT), "disk") for _ in range(count)]


def digest(size: int) -> str:
    """Of what the kernel's driver reads at the start of the disk."""
    with open(f"/dev/{kernel_disk()}", "rb") as disk:
        return hashlib.sha256(disk.read(size)).hexdigest()


def expect(text: str, *words: str) -> None:
    """One line for the user with all these in it."""
    say(f"  {text}")
    for word in words:
        if word not in text:
            raise AssertionError(f"{word!r} is not in: {text}")


def kernel_controller(serial: str = SERIAL) -> Path:
    """Where the kernel's driver shows the controller, whose number changes. Waits for it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for path in Path("/sys/class/nvme").glob("nvme*"):
            if (path / "serial").read_text().strip() == serial and os.path.exists(f"/dev/{path.name}n1"):
                return path
        time.sleep(0.1)
    raise AssertionError(f"the kernel has no controller {serial}")


def kernel_disk() -> str:
    return f"{kernel_controller().name}n1"


def expect_identity(shown: dict[str, Any], sysfs: dict[str, str], sectors: int) -> None:
    """The driver says of the controller what the kernel's said."""
    controller, namespace = shown["controller"], shown["namespace"]
    for name, attribute in SHOWN.items():
        assert controller[name] == sysfs[attribute], (name, controller[name], sysfs[attribute])
    assert namespace["size"] == shown["size"] == sectors * 512
    result("identify", f"{controller['model']} / {controller['serial']} / {controller['firmware']}")


# ---- everything that works ----


def good() -> None:
    controller = kernel_controller()
    address = pci_address(controller)
    sectors = int(Path(f"/sys/block/{kernel_disk()}/size").read_text())
    sysfs = {name: (controller / name).read_text().strip() for name in SHOWN.values()}
    refused_while_bound(address)
    asyncio.run(other_shapes())
    expect(vfio_bind("bind", address), "is bound to vfio-pci")
    asyncio.run(refused_while_free(address))
    target = Target(
        "daemon",
        *iothreads("io0", "io1"),
        *node(address, discard="unmap"),
        *NBD_SERVER,
        *export("io0", "io1"),
        *VHOST_EXPORT,
    )
    expect_identity(target.node(), sysfs, sectors)
    asyncio.run(refused_while_used(address))
    say("random requests")
    models = asyncio.run(random_requests(target, 4))
    say("zero copy")
    zero_copy(target)
    asyncio.run(discards(target))
    target.stop()
    asyncio.run(serves_its_configuration(address, models[0]))
    finish(address, models)


def refused_while_bound(address: str) -> None:
    expect(refusal(*node(address)), "node 'disk'", "'nvme'", "vfio-pci", f"vfio-bind bind {address}")
    name = kernel_disk()
    run("mkfs.ext4", "-q", "-F", f"/dev/{name}", "8M")
    run("mount", "-t", "ext4", f"/dev/{name}", "/mnt")
    expect(unbindable(Binder(address).bind), "busy", name)
    expect(Binder(address).status(), "driver nvme", f"{name} (in use)")
    run("umount", "/mnt")
    expect(unbindable(Binder(address).unbind), "bound to nvme, not to vfio-pci")
    expect(vfio_bind("bind", ABSENT, fails=True), f"no PCI device {ABSENT}")


async def refused_while_free(address: str) -> None:
    """The device is bound to vfio-pci and nobody uses it."""
    expect(Binder(address).status(), "driver vfio-pci", "IOMMU group", "alone")
    expect(await refused(options(ABSENT)), f"no PCI device {ABSENT}")
    expect(await refused(options("nvme0")), "'nvme0' is not a PCI address")
    expect(await refused(options("0000:00:1f.2")), "is not an NVMe controller")
    expect(await refused(options(address, namespace=7)), "namespace 7", "does not exist")
    expect(await refused(options(address, namespace=5000)), "namespace 5000 does not exist")
    expect(await refused(options(address, timeout=0)), "'timeout'")
    os.seteuid(NOBODY)
    expect(await refused(options(address)), "Permission denied", "/dev/vfio/")
    os.seteuid(0)


async def other_shapes() -> None:
    """The second controller, whose namespaces are of several kinds."""
    address = pci_address(kernel_controller("other"))
    Binder(address).bind()
    for number, block_size in {1: 512, 3: 4096}.items():
        await works(options(address, namespace=number, discard="unmap"), block_size)
    expect(await refused(options(address, namespace=4)), "namespace 4", "8 bytes of metadata")
    expect(await refused(options(address, namespace=5)), "namespace 5", "zoned")
    Binder(address).unbind()


async def works(blockdev: dict[str, object], block_size: int) -> None:
    service = Service()
    service.datapath.add_thread()
    await service.add_blockdev(parse_blockdev(blockdev))
    disk = service.graph.get("disk")
    shown = disk.counters()
    assert shown["namespace"]["block-size"] == block_size and shown["queues"]["number"] == 1, shown
    data = random.Random(block_size).randbytes(3 * MIB)
    await disk.write(1000, data)
    await disk.discard(8 * MIB, MIB)
    await disk.write_zeroes(5000, 100_000)
    data = data[:4000] + bytes(100_000) + data[104_000:]
    load.compare(await disk.read(1000, len(data)), data, 1000)
    assert not await service.close()


async def refused_while_used(address: str) -> None:
    expect(await refused(options(address)), "IOMMU group", "is in use")
    expect(unbindable(Binder(address).unbind), "busy", "IOMMU group")


async def refused(blockdev: dict[str, object]) -> str:
    """The error of a node that cannot be opened, which names it and comes soon; nothing is left of it."""
    service = Service()
    begun = time.monotonic()
    try:
        await service.add_blockdev(parse_blockdev(blockdev))
    except BlockError as error:
        text = str(error)
    else:
        raise AssertionError(f"{blockdev} was not refused")
    finally:
        assert not await service.close()
    assert text.startswith("node 'disk': ") and time.monotonic() - begun < 10, text
    return text


def unbindable(action: Callable[[], str]) -> str:
    try:
        said = action()
    except VfioError as error:
        return str(error)
    raise AssertionError(f"it was not refused: {said}")


async def random_requests(target: Target, regions: int) -> list[load.Model]:
    """Two connections, each on an I/O thread and queue of its own."""
    connected = await clients(2)
    models = [load.Model(i * 6 * MIB, 6 * MIB) for i in range(regions)]
    for i, model in enumerate(models):
        model.data[:] = random.Random(i).randbytes(len(model.data))
        await load.fill(connected[i % 2], model)
    begun = time.monotonic()
    done = await load.run(connected, models, 1, 60)
    result("requests", f"{sum(done.values())} in {time.monotonic() - begun:.1f} s: {done}")
    for client in connected:
        await client.close()
    queues = target.node()["queues"]
    assert queues["number"] == 3 and queues["completion-errors"] == 0, queues
    result("queues", queues)
    return models


def zero_copy(target: Target) -> None:
    """A front end's memory is mapped into the IOMMU: nothing of what it reads and writes is copied."""
    data = random.Random(7).randbytes(MIB)
    memory = GuestMemory(16 * MIB)
    with FrontEnd.connect(SOCKET, memories=[memory]) as front_end:
        sector = 24 * MIB // 512
        for at in range(0, MIB, 256 << 10):  # until the pieces are mapped, they are bounced
            front_end.write(sector + at // 512, data[at : at + (256 << 10)])
        time.sleep(1)
        before = target.node()
        for at in range(0, MIB, 256 << 10):
            front_end.write(sector + at // 512, data[at : at + (256 << 10)])
        for at in range(0, MIB, 256 << 10):
            load.compare(front_end.read(sector + at // 512, 256 << 10), data[at : at + (256 << 10)], at)
        after = target.node()
    direct = after["queues"]["direct-bytes"] - before["queues"]["direct-bytes"]
    bounced = after["queues"]["bounced-bytes"] - before["queues"]["bounced-bytes"]
    result("zero-copy", f"{direct} bytes direct, {bounced} bounced, {after['dma']}")
    assert direct == 2 * MIB and bounced == 0


async def discards(target: Target) -> None:
    """A discard reaches the drive, whose file then has a hole: the test outside looks."""
    (client,) = await clients(1)
    await client.write(40 * MIB, b"\x5a" * MIB)
    before = target.node()["requests"]["discard"]
    await client.trim(40 * MIB, MIB)
    await client.flush()
    assert target.node()["requests"]["discard"] == before + 1
    assert await client.read(40 * MIB, MIB) == bytes(MIB)
    await client.write(41 * MIB, b"\x5a" * MIB)
    await client.write_zeroes(41 * MIB, MIB)
    assert await client.read(41 * MIB, MIB) == bytes(MIB)
    await client.close()


async def serves_its_configuration(address: str, model: load.Model) -> None:
    """The graph file of configs/, but for the device's address."""
    text = Path("/configs/nvme.yaml").read_text()
    Path("/tmp/nvme.yaml").write_text(text.replace('"0000:01:00.0"', f'"{address}"'))
    target = Target("serve", "/tmp/nvme.yaml")
    client = await NbdClient.connect("/tmp/nvme-nbd.sock", "drive")
    load.compare(await client.read(model.start, len(model.data)), model.data, model.start)
    await client.close()
    target.stop()
    result("configuration", "served")


def finish(address: str, models: Sequence[load.Model]) -> None:
    """Gives the device back, and has the kernel read what was written. The target has ended."""
    say("the end")
    expect(vfio_bind("unbind", address), "is bound to nvme")
    size = sum(len(model.data) for model in models)
    wanted = hashlib.sha256(b"".join(bytes(model.data) for model in models)).hexdigest()
    found = digest(size)
    assert found == wanted, (found, wanted)
    result("sha256", found)
    result("size", size)


# ---- a drive that stalls, and one that fails ----

STALLED = 16  # requests in flight when the drive stalls
BROKEN = 48 * MIB  # where reading fails: see the test


def stall() -> None:
    address = pci_address(kernel_controller())
    vfio_bind("bind", address)
    argv = ["daemon", *node(address, timeout=2, discard="unmap"), *NBD_SERVER, *export()]
    target = Target(*argv)
    assert target.node()["namespace"]["block-size"] == 4096
    models = asyncio.run(stalled_requests(target))
    asyncio.run(failing_request(target))
    asyncio.run(killed_at_work(target))
    target = Target(*argv)
    say("started again")
    asyncio.run(still_there(models))
    target.stop()
    finish(address, models)


async def stalled_requests(target: Target) -> list[load.Model]:
    connected = await clients(2)
    models = [load.Model(i * 6 * MIB, 6 * MIB) for i in range(2)]
    await load.run(connected, models, 11, 30)
    say("STALL: please")
    source = random.Random(3)
    failed = rounds = 0
    begun = time.monotonic()
    while not target.node()["queues"]["controller-resets"]:
        rounds += 1
        blocks = [(i * 64 << 10, source.randbytes(16384)) for i in range(STALLED)]
        failed += await write_all(target, connected, models[0], blocks)
    result("stalled", f"{failed} of {rounds * STALLED} failed, {time.monotonic() - begun:.1f} s")
    result("recovery", target.node()["queues"])
    await load.run(connected, models, 12, 30)
    for client in connected:
        await client.close()
    return models


async def write_all(
    target: Target, connected: list[NbdClient], model: load.Model, blocks: list[tuple[int, bytes]]
) -> int:
    """Writes them at the same time. One that fails has to fail with EIO; it is done again afterwards."""
    writes = [asyncio.ensure_future(connected[i % 2].write(*block)) for i, block in enumerate(blocks)]
    told = False
    while not all(write.done() for write in writes):
        await asyncio.wait(writes, timeout=0.5)
        if not told and target.node()["queues"]["controller-resets"]:
            told = True
            say("STALL: the controller was reset")
    failed = 0
    for write, (at, data) in zip(writes, blocks, strict=True):
        error = write.exception()
        if error is not None:
            assert isinstance(error, OSError) and error.errno == errno.EIO, error
            failed += 1
            await connected[0].write(at, data)
        model.data[at : at + len(data)] = data
    return failed


async def failing_request(target: Target) -> None:
    """A read that the drive fails is one error, with a line in the log, and nothing more."""
    (client,) = await clients(1)
    try:
        await client.read(BROKEN, 4096)
    except OSError as error:
        assert error.errno == errno.EIO, error
    else:
        raise AssertionError("a read that the drive fails succeeded")
    assert await client.read(BROKEN + 65536, 4096) == bytes(4096)
    await client.close()
    queues = target.node()["queues"]
    assert queues["completion-errors"] > 0, queues
    result("failed-read", f"status {queues['last-status']:#x}")
    failed = "a command in queue 1 failed: unrecovered read error"
    expect(target.warnings(), failed, "the controller is reset", "works again")


async def killed_at_work(target: Target) -> None:
    """The kernel takes the device out of the hands of a target that dies with requests in flight."""
    (client,) = await clients(1)
    writes = [asyncio.ensure_future(client.write(BROKEN + i * MIB, bytes(MIB))) for i in range(8)]
    await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
    target.kill()
    say("killed")
    await asyncio.wait(writes)
    await client.abort()
    for write in writes:
        write.exception()


async def still_there(models: Sequence[load.Model]) -> None:
    (client,) = await clients(1)
    for model in models:
        await load.check(client, model)
    await client.close()
    result("after-a-kill", "all read")


# ---- no IOMMU ----


def no_iommu() -> None:
    address = pci_address(kernel_controller())
    expect(unbindable(Binder(address).bind), address, "no IOMMU")
    expect(Binder(address).status(), "IOMMU group: none")
    expect(asyncio.run(refused(options(address))), address, "no IOMMU")
    result("sha256", digest(MIB))


def main() -> None:
    drivers.load()
    {"good": good, "stall": stall, "no-iommu": no_iommu}[sys.argv[1]]()


if __name__ == "__main__":
    main()
