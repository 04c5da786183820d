# SPDX-License-Identifier: Apache-2.0
"""The example plugins in plugins/, each under real nbdkit and as a node of this target."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from target.exports.nbd.protocol import CommandFlag, TransmissionFlag
from target.peers.nbd_client import NbdClient
from tests.support.daemon import blocktarget_argv
from tests.support.nbdkit_server import PLUGINS, ROOT, Hosted, Nbdkit, Server, refusal, serve
from tests.support.tools import qemu_img, run

RAMDISK = PLUGINS / "compressed-ramdisk.py"
TAR = PLUGINS / "tar-member.py"
OVERLAY = PLUGINS / "encrypt-overlay.py"
KINDS = ("nbdkit", "target")
HOLE = 3  # hole and zero
MIB = 1 << 20

Serve = Callable[..., Server]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(kind: str, scratch: Path) -> Iterator[Serve]:
    """served(script, *parameters) starts a server; the last one is stopped at the end."""
    servers: list[Server] = []

    def begin(script: Path, *parameters: str) -> Server:
        servers.append(serve(kind, scratch, script, *parameters))
        return servers[-1]

    yield begin
    try:
        for server in servers:
            server.stop()
    finally:
        for server in servers:
            server.kill()


async def connect(server: Server) -> NbdClient:
    return await NbdClient.connect(str(server.sock), "disk")


async def random_use(client: NbdClient, model: bytearray, base: int, end: int, seed: int, steps: int) -> None:
    """Random requests inside [base, end), compared with a flat model."""
    chance = random.Random(seed)
    trims = client.export.flags & TransmissionFlag.SEND_TRIM
    for _ in range(steps):
        offset = chance.randrange(base, end)
        length = min(chance.choice((1, 511, 512, 4096, 32768, 70_001, 200_000)), end - offset)
        part = slice(offset, offset + length)
        match chance.randrange(6):
            case 0 | 1:
                assert await client.read(offset, length) == model[part]
            case 2 | 3:
                model[part] = chance.choice((chance.randbytes(length), bytes(length), b"x" * length))
                await client.write(offset, bytes(model[part]), chance.choice((0, CommandFlag.FUA)))
            case 4:
                flags = chance.choice((0, CommandFlag.NO_HOLE, CommandFlag.FUA))
                await client.write_zeroes(offset, length, flags)
                model[part] = bytes(length)
            case 5 if trims:
                await trim(client, model, offset, length)


async def trim(client: NbdClient, model: bytearray, offset: int, length: int) -> None:
    """Each byte is afterwards what it was, or zero."""
    await client.trim(offset, length)
    found = await client.read(offset, length)
    before = bytes(model[offset : offset + length])
    assert all(new in (old, 0) for new, old in zip(found, before, strict=True))
    model[offset : offset + length] = found


async def random_use_by_many(server: Server, model: bytearray, seed: int, steps: int) -> None:
    """Clients at the same time, each in a part of its own; the parts share pages and sectors."""
    size = len(model)
    bounds = [0, size // 4 + 7, size // 2 - 300, size // 4 * 3 + 1025, size]
    clients = [await connect(server) for _ in bounds[1:]]
    try:
        await asyncio.gather(
            *(
                random_use(client, model, base, end, seed + base, steps)
                for client, base, end in zip(clients, bounds, bounds[1:], strict=False)
            )
        )
        await clients[0].flush()
        assert await clients[1].read(0, size) == model
    finally:
        for client in clients:
            await client.close()


async def neighbours(server: Server, rounds: int) -> None:
    """Writes at the same time to parts of the same page or sector: none is lost."""
    clients = [await connect(server) for _ in range(4)]
    parts = [(at, bytes([at // 256 + 1]) * 256) for at in range(0, 4096, 256)]
    for _ in range(rounds):
        await clients[0].write(0, random.Random(9).randbytes(4096))
        await asyncio.gather(*(clients[at // 256 % 4].write(at, data) for at, data in parts))
        assert await clients[1].read(0, 4096) == b"".join(data for _, data in parts)
    for client in clients:
        await client.close()


def trouble(kind: str, scratch: Path, script: Path, *parameters: str) -> str:
    """What the server says that does not start: the target names the node."""
    said = refusal(kind, scratch, script, *parameters)
    if kind == "target":
        assert "node 'disk'" in said, said
    return said


# ---- compressed-ramdisk ----


async def test_ramdisk_agrees_with_a_flat_model(served: Serve) -> None:
    server = served(RAMDISK, "size=2M")
    await random_use_by_many(server, bytearray(2 * MIB), 11, 120)


async def test_ramdisk_loses_no_write_beside_another(served: Serve) -> None:
    await neighbours(served(RAMDISK, "size=64k"), 100)


async def test_ramdisk_is_sparse(served: Serve) -> None:
    server = served(RAMDISK, "size=8M", "level=9")
    client = await connect(server)
    assert client.export.size == 8 * MIB
    assert await client.map() == [(8 * MIB, HOLE)]
    page = 32 << 10
    await client.write(MIB + 5, b"data" * 100)
    await client.write(5 * MIB - 1, b"xy")
    expected = [(MIB, HOLE), (page, 0), (4 * MIB - 2 * page, HOLE), (2 * page, 0), (3 * MIB - page, HOLE)]
    assert await client.map() == expected
    assert await client.block_status(0, 8 * MIB, CommandFlag.REQ_ONE) == [(MIB, HOLE)]
    await client.trim(MIB, page)
    await client.write_zeroes(5 * MIB - 1, 1)
    await client.write(5 * MIB, b"\0" * 7)
    assert await client.map() == [(8 * MIB, HOLE)]
    await client.close()


def test_ramdisk_compresses(served: Serve, scratch: Path) -> None:
    """64 MiB that compress well take little memory."""
    server = served(RAMDISK, "size=64M")
    image = scratch / "image"
    image.write_bytes(b"A line that is there many times.\n" * (64 * MIB // 33))
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", image, server.uri("disk"))
    qemu_img("compare", "-f", "raw", "-F", "raw", image, server.uri("disk"))
    assert plugin_memory(server) < 48 * MIB


def plugin_memory(server: Server) -> int:
    """RssAnon of the process that runs the script, in bytes."""
    pid = script_process(server)
    (line,) = re.findall(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(line) << 10


def script_process(server: Server) -> int:
    if isinstance(server, Nbdkit):
        return server.process.pid
    parent = server.daemon.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (pid,) = [child for child in children if b"python" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return int(pid)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ([], "the parameter size=SIZE is required"),
        (["size=many"], "size"),
        (["size=1M", "level=0"], "level=0: a number from 1 to 9 is expected"),
        (["size=1M", "level=fast"], "level=fast: a number from 1 to 9 is expected"),
        (["size=1M", "pages=2"], "unknown parameter 'pages'"),
    ],
)
def test_ramdisk_refuses(kind: str, scratch: Path, parameters: list[str], says: str) -> None:
    assert says in trouble(kind, scratch, RAMDISK, *parameters)


# ---- tar-member ----


@pytest.fixture
def archive(scratch: Path) -> Path:
    """Members disk (twice, the last counts), link and large."""
    path = scratch / "archive.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "disk", b"the old one")
        add(tar, "a/" + "long" * 60, b"n" * 1000)
        add(tar, "disk", random.Random(3).randbytes(300_032))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "disk"
        tar.addfile(link)
        add(tar, "last", b"z" * 5120)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def served_read_only(kind: str, scratch: Path, *parameters: str) -> Server:
    if kind == "nbdkit":
        return Nbdkit(scratch, TAR, *parameters)
    return Hosted(scratch, TAR, *parameters, read_only=True)


async def test_tar_member_is_a_read_only_disk(kind: str, scratch: Path, archive: Path) -> None:
    server = served_read_only(kind, scratch, f"file={archive}", "member=disk")
    try:
        client = await connect(server)
        data = random.Random(3).randbytes(300_032)
        assert client.export.size == len(data)
        assert await client.read(0, len(data)) == data
        for offset, length in ((1, 1), (299_000, 1032), (4095, 8193)):
            assert await client.read(offset, length) == data[offset : offset + length]
        await client.cache(0, len(data))
        with pytest.raises(PermissionError):
            await client.write(0, b"x")
        await client.close()
    finally:
        server.stop()


async def test_tar_member_in_parallel(kind: str, scratch: Path, archive: Path) -> None:
    server = served_read_only(kind, scratch, f"file={archive}", "member=disk")
    try:
        data = random.Random(3).randbytes(300_032)
        clients = [await connect(server) for _ in range(3)]

        async def read_all(client: NbdClient, step: int) -> None:
            for offset in range(0, len(data) - step, step):
                assert await client.read(offset, step) == data[offset : offset + step]

        await asyncio.gather(*(read_all(client, 4096 + 7 * i) for i, client in enumerate(clients * 4)))
        for client in clients:
            await client.close()
    finally:
        server.stop()


def test_tar_member_refuses(kind: str, scratch: Path, archive: Path) -> None:
    def says(*parameters: str) -> str:
        return trouble(kind, scratch, TAR, *parameters)

    file = f"file={archive}"
    assert "member=NAME are required" in says(file)
    assert "no member 'absent'" in says(file, "member=absent")
    assert "'link' is not a regular file" in says(file, "member=link")
    assert "unknown parameter 'format'" in says(file, "member=disk", "format=ustar")
    assert "No such file" in says(f"file={scratch / 'absent'}", "member=disk")


def test_tar_member_refuses_archives_it_cannot_serve(kind: str, scratch: Path, archive: Path) -> None:
    def says(name: str, data: bytes, member: str) -> str:
        (scratch / name).write_bytes(data)
        return trouble(kind, scratch, TAR, f"file={scratch / name}", f"member={member}")

    content = archive.read_bytes()
    assert "not an uncompressed tar archive" in says("a.tgz", gzip.compress(content), "disk")
    assert "not an uncompressed tar archive" in says("noise", random.Random(1).randbytes(10240), "disk")
    cut = content[: content.index(b"z" * 512) + 600]
    refused = says("cut.tar", cut, "last")
    assert "ends inside of the member 'last'" in refused or "unexpected end of data" in refused
    assert "is sparse" in says("sparse.tar", sparse_archive(scratch), "hole")


def sparse_archive(scratch: Path) -> bytes:
    """Made by GNU tar."""
    with (scratch / "hole").open("wb") as file:
        file.truncate(MIB)
        file.seek(MIB // 2)
        file.write(b"data")
    run("tar", "-C", scratch, "-S", "-cf", scratch / "s.tar", "hole")
    return (scratch / "s.tar").read_bytes()


# ---- encrypt-overlay ----


@pytest.fixture
def lower(scratch: Path) -> Path:
    return scratch / "lower"


@pytest.mark.parametrize("discard", ["false", "true"])
async def test_overlay_agrees_with_a_flat_model(
    served: Serve, scratch: Path, lower: Path, discard: str
) -> None:
    """Also when it is opened again."""
    words = [f"file={lower}", "passphrase=correct horse", f"discard={discard}"]
    model = bytearray(MIB)
    server = served(OVERLAY, *words, "size=1M")
    await random_use_by_many(server, model, 5, 60)
    server.stop()
    server = served(OVERLAY, *words)
    client = await connect(server)
    assert await client.read(0, MIB) == model
    await client.close()


async def test_overlay_loses_no_write_beside_another(served: Serve, lower: Path) -> None:
    await neighbours(served(OVERLAY, f"file={lower}", "passphrase=p", "size=64k"), 100)


async def test_overlay_stores_nothing_in_the_clear(served: Serve, lower: Path) -> None:
    server = served(OVERLAY, f"file={lower}", "passphrase=p", "size=1M")
    client = await connect(server)
    text = b"a secret of 32 bytes, repeated. " * 2048
    await client.write(4096, text)
    await client.write_zeroes(4096 * 100, 4096, CommandFlag.NO_HOLE)
    await client.flush()
    await client.close()
    stored = lower.read_bytes()
    assert len(stored) == MIB + 4096
    assert text[:16] not in stored
    parts = [stored[at : at + 16] for at in range(8192, 8192 + len(text), 16)]
    assert len(set(parts)) == len(parts)  # equal text is not equal when stored
    assert any(stored[4096 * 101 : 4096 * 102])  # zeros are encrypted too


async def test_overlay_extents_and_discard(served: Serve, lower: Path) -> None:
    server = served(OVERLAY, f"file={lower}", "passphrase=p", "size=1M", "discard=true")
    client = await connect(server)
    assert await client.map() == [(MIB, HOLE)]
    assert await client.read(0, 65536) == bytes(65536)
    await client.write(65536, b"d" * 65536)
    assert await client.map() == [(65536, HOLE), (65536, 0), (MIB - 131072, HOLE)]
    before = lower.stat().st_blocks
    await client.trim(65536 + 100, 32768)  # parts of sectors stay
    assert await client.read(65536, 65536) == b"d" * 4096 + bytes(28672) + b"d" * 32768
    await client.write_zeroes(65536, 65536)
    assert await client.map() == [(MIB, HOLE)]
    assert lower.stat().st_blocks < before
    await client.close()


async def test_overlay_without_discard_keeps_its_space(served: Serve, lower: Path) -> None:
    server = served(OVERLAY, f"file={lower}", "passphrase=p", "size=1M")
    client = await connect(server)
    await client.write(0, b"d" * 65536)
    await client.write_zeroes(0, 65536)
    assert await client.read(0, 65536) == bytes(65536)
    assert (await client.map())[0] == (65536, 0)
    await client.close()


def test_overlay_reads_secrets_from_files(served: Serve, scratch: Path, lower: Path) -> None:
    (scratch / "pass").write_text("correct horse\nnot this line\n")
    (scratch / "key").write_bytes(b"\0\n\xff" * 50)
    served(OVERLAY, f"file={lower}", "passphrase=correct horse", "size=64k").stop()
    served(OVERLAY, f"file={lower}", f"passphrase=+{scratch / 'pass'}").stop()
    other = scratch / "other"
    served(OVERLAY, f"file={other}", f"keyfile={scratch / 'key'}", "size=64k").stop()
    served(OVERLAY, f"file={other}", f"keyfile={scratch / 'key'}", "size=65536").stop()


def test_overlay_refuses(kind: str, served: Serve, scratch: Path, lower: Path) -> None:
    def says(*parameters: str) -> str:
        return trouble(kind, scratch, OVERLAY, *parameters)

    file, word = f"file={lower}", "passphrase=right"
    assert "No such file" in says(file, word)
    assert "a multiple of 4096 is expected" in says(file, word, "size=1000")
    served(OVERLAY, file, word, "size=64k").stop()
    before = lower.read_bytes()
    assert "the passphrase is wrong" in says(file, "passphrase=wrong")
    assert "the disk has 65536 bytes, not 131072" in says(file, word, "size=128k")
    assert "either passphrase=PASSPHRASE or keyfile=FILE is required" in says(file)
    assert "either passphrase=PASSPHRASE" in says(file, word, f"keyfile={lower}")
    assert "the passphrase is empty" in says(file, "keyfile=/dev/null")
    assert "discard=true or discard=false is expected" in says(file, word, "discard=maybe")
    assert "unknown parameter 'cipher'" in says(file, word, "cipher=none")
    assert "neither a regular file nor a block device" in says("file=/dev/null", word)
    assert lower.read_bytes() == before
    plain = scratch / "plain"
    plain.write_bytes(b"plain text" * 1000)
    assert "no header of an encrypted disk" in says(f"file={plain}", word)
    assert "no header of an encrypted disk" in says(f"file={plain}", word, "size=64k")
    assert plain.read_bytes() == b"plain text" * 1000


@pytest.mark.parametrize("position", [8, 11, 12, 16, 20, 60])
def test_overlay_does_not_trust_its_header(
    kind: str, served: Serve, scratch: Path, lower: Path, position: int
) -> None:
    """A cost that would take all memory is refused like any other damage, and at once."""
    served(OVERLAY, f"file={lower}", "passphrase=p", "size=64k").stop()
    with lower.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, position)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x1F]), position)
    said = trouble(kind, scratch, OVERLAY, f"file={lower}", "passphrase=p")
    assert "no header of an encrypted disk" in said or "or the header is damaged" in said


def test_overlay_locks_its_file(kind: str, served: Serve, scratch: Path, lower: Path) -> None:
    served(OVERLAY, f"file={lower}", "passphrase=p", "size=64k")
    other = scratch / "other"
    other.mkdir()
    assert "in use by another process" in trouble(kind, other, OVERLAY, f"file={lower}", "passphrase=p")


# ---- configs/nbdkit-plugin.yaml ----


def test_shipped_configuration(scratch: Path) -> None:
    (scratch / "plugins").symlink_to(PLUGINS)
    command = "qemu-io -f raw -c 'write -P 7 1M 1M' -c 'read -P 7 1M 1M' $uri && nbdinfo --map --totals $uri"
    argv = blocktarget_argv("serve", "--run", command, ROOT / "configs/nbdkit-plugin.yaml")
    done = subprocess.run(argv, cwd=scratch, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    totals = [line.split()[0] for line in done.stdout.splitlines() if "hole" in line or "data" in line]
    assert sorted(map(int, totals)) == [MIB, 1023 * MIB]
