# SPDX-License-Identifier: Apache-2.0
"""The NBD export with libnbd's shell and tools, on several sockets and threads; random use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from target.peers.nbd_client import NbdClient
from tests.support.daemon import (
    Daemon,
    blockdev,
    free_port,
    image_node,
    nbd_server_tcp,
    nbd_server_unix,
    nbd_uri,
)
from tests.support.nbd_model import Model
from tests.support.tools import check_image, create_image, fill, qemu_img, qemu_io, run

Start = Callable[..., Daemon]
MIB = 1 << 20


def export(node: str, **options: Any) -> list[str]:
    value = {"type": "nbd", "id": f"e-{node}", "node-name": node, "writable": True, **options}
    return ["--export", json.dumps(value)]


def nbdsh(*lines: str, uri: str | None = None) -> str:
    """Runs lines of Python in libnbd's shell (the system's Python), connected as ``h`` when uri is given."""
    words = ["-u", uri] if uri else []
    for line in lines:
        words += ["-c", line]
    return run("/usr/bin/python3", "-m", "nbd", *words).stdout


@pytest.fixture
def disk(scratch: Path, start: Start) -> str:
    """The URI of a writable raw export of 64 MiB with data and holes, on two I/O threads."""
    image = fill(scratch / "disk.raw", 64 * MIB, seed=5, pieces=20)
    threads = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    sock = scratch / "nbd.sock"
    node = image_node(image, "raw")
    start(*threads, *node, *nbd_server_unix(sock), *export("disk", iothread=["t0", "t1"]))
    return nbd_uri(sock)


def test_several_listeners_offer_all_exports(scratch: Path, start: Start) -> None:
    nodes = [
        blockdev(driver="null-co", node_name=name, size=size) for name, size in (("a", MIB), ("b", 3 * MIB))
    ]
    port = free_port()
    start(
        *nodes[0],
        *nodes[1],
        *nbd_server_unix(scratch / "1.sock"),
        *nbd_server_unix(scratch / "2.sock"),
        *nbd_server_tcp(port),
        *export("a", name="first", description="the first one"),
        *export("b", name="second/with a name", writable=False),
    )
    unix = [f"nbd+unix://?socket={scratch / name}" for name in ("1.sock", "2.sock")]
    for uri in (*unix, f"nbd://127.0.0.1:{port}"):
        listed = json.loads(run("nbdinfo", "--list", "--json", uri).stdout)
        found = {item["export-name"]: item for item in listed["exports"]}
        assert set(found) == {"first", "second/with a name"}
        assert found["first"]["description"] == "the first one"
        assert found["first"]["export-size"] == MIB
        assert found["second/with a name"]["is_read_only"] is True
        assert found["first"]["contexts"] == ["base:allocation"]


def test_libnbd_without_structured_replies(disk: str) -> None:
    out = nbdsh(
        "h.set_request_structured_replies(False)",
        "h.set_export_name('disk')",
        f"h.connect_unix({disk.split('socket=')[1]!r})",
        "assert not h.get_structured_replies_negotiated() and not h.can_df()",
        "h.pwrite(b'x' * 3000000, 1000)",
        "assert h.pread(3000000, 1000) == b'x' * 3000000",
        "h.flush(); print('ok')",
    )
    assert out == "ok\n"


def test_libnbd_by_the_old_export_name_option(disk: str) -> None:
    """A client that does not know fixed newstyle gets its export, too."""
    out = nbdsh(
        "h.set_handshake_flags(0)",
        "h.set_export_name('disk')",
        f"h.connect_unix({disk.split('socket=')[1]!r})",
        "h.pwrite(b'old', 77); print(h.get_size(), h.pread(3, 77))",
    )
    assert out == f"{64 * MIB} {bytearray(b'old')}\n"


def test_libnbd_structured_read_and_flags(disk: str) -> None:
    lines = [
        "h.zero(1 << 20, 0)",
        "h.pwrite(b'd' * 65536, 131072)",
        "found = []",
        "note = lambda data, offset, kind, error: found.append((offset, len(data), kind))",
        "h.pread_structured(1 << 19, 0, note)",
        "assert sorted(found) == [(0, 131072, nbd.READ_HOLE), (131072, 65536, nbd.READ_DATA), "
        "(196608, 327680, nbd.READ_HOLE)], found",
        "found.clear()",
        "h.pread_structured(1 << 18, 0, note, nbd.CMD_FLAG_DF)",
        "assert found == [(0, 1 << 18, nbd.READ_DATA)], found",
        "h.trim(4096, 0, nbd.CMD_FLAG_FUA); h.cache(1 << 20, 0)",
        "h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)",
        "assert h.pread(65536, 131072) == bytearray(65536)",
        "print('ok')",
    ]
    assert nbdsh(*lines, uri=disk) == "ok\n"


def test_nbdcopy_both_ways_on_several_connections(disk: str, scratch: Path) -> None:
    source = fill(scratch / "source.raw", 64 * MIB, seed=6, pieces=100)
    run("nbdcopy", "--connections=4", "--requests=64", source, disk)
    qemu_img("compare", "-f", "raw", "-F", "raw", source, disk)
    run("nbdcopy", "--connections=4", disk, scratch / "back.raw")
    qemu_img("compare", "-f", "raw", "-F", "raw", source, scratch / "back.raw")


@pytest.mark.parametrize("bs", ["4k", "128k"])
def test_fio_verifies_with_two_jobs(disk: str, bs: str) -> None:
    """Two connections, on two I/O threads."""
    job = ["--ioengine=nbd", f"--uri={disk}", "--rw=randwrite", f"--bs={bs}", "--iodepth=32", "--size=16m"]
    verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]
    jobs = ["--name=a", *job, *verify, "--offset=0", "--name=b", *job, *verify, "--offset=32m"]
    assert "err= 0" in run("fio", *jobs).stdout


# ---- random use against a model ----


def chain(scratch: Path, options: str) -> Path:
    """Two overlays of different sizes over a base, each with data, zeros and holes."""
    base = create_image(scratch / "base.qcow2", "12M", options=options)
    qemu_io(base, "write -P 1 0 3M", "write -P 2 7M 2M", format="qcow2")
    middle = create_image(scratch / "middle.qcow2", "10M", options=options, backing=base)
    qemu_io(middle, "write -P 3 1M 1M", "write -z 8M 512k", format="qcow2")
    return create_image(scratch / "disk.qcow2", "16M", options=options, backing=middle)


def flat(scratch: Path, image: Path, format: str) -> bytearray:
    output = scratch / "flat.raw"
    qemu_img("convert", "-f", format, "-O", "raw", image, output)
    return bytearray(output.read_bytes())


async def exercise(address: str, data: bytearray, seed: int, structured: bool = True) -> Model:
    clients = [await NbdClient.connect(address, "disk", structured=structured or n == 0) for n in range(3)]
    model = Model(clients, data, seed)
    await model.run(1500, depth=24)
    await model.check_all()
    await asyncio.gather(*(client.close() for client in clients))
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["raw", "chain", "chain-512", "chain-v2"])
async def test_random_operations_against_a_model(scratch: Path, start: Start, kind: str, seed: int) -> None:
    """Three connections on two I/O threads, 24 operations in flight."""
    if kind == "raw":
        image, format = fill(scratch / "disk.raw", 16 * MIB, seed=seed, pieces=5), "raw"
    else:
        options = {"chain": "", "chain-512": "cluster_size=512", "chain-v2": "compat=0.10"}[kind]
        image, format = chain(scratch, options), "qcow2"
    data = flat(scratch, image, format)
    threads = [word for name in ("t0", "t1") for word in ("--object", f"iothread,id={name}")]
    sock = scratch / "nbd.sock"
    daemon = start(
        *threads, *image_node(image, format), *nbd_server_unix(sock), *export("disk", iothread=["t0", "t1"])
    )
    model = await exercise(str(sock), data, seed, structured=seed != 1)
    daemon.stop()
    after = flat(scratch, image, format)
    for sector in set(range(len(data) // 512)) - model.discarded:
        assert after[sector * 512 : sector * 512 + 512] == data[sector * 512 : sector * 512 + 512], sector
    if format == "qcow2":
        check_image(image)
