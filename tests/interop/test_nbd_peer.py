# SPDX-License-Identifier: Apache-2.0
"""The scriptable NBD server with clients that are not ours: it has to be right before it tests others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from target.exports.nbd.protocol import Command, CommandFlag, TransmissionFlag
from target.peers.nbd_disk import SparseDisk
from target.peers.nbd_script import ALL_FLAGS, ServerOptions
from target.peers.nbd_server import NbdServer, ServerThread
from tests.support.daemon import nbd_uri
from tests.support.tools import fill, qemu_img, qemu_io, run

MIB = 1 << 20
GIB = 1 << 30


@contextmanager
def served(scratch: Path, options: ServerOptions) -> Iterator[tuple[NbdServer, str]]:
    socket = scratch / "peer.sock"
    with ServerThread(NbdServer(options), str(socket)) as server:
        yield server, nbd_uri(socket)
    assert server.violations == []


LEGAL = {
    "plain": ServerOptions(),
    "simple": ServerOptions(structured=False),
    "mixed": ServerOptions(simple_replies=True, chunk=10_000),
    "shuffled": ServerOptions(shuffle=1, chunk=50_000),
    "blocks": ServerOptions(blocks=(4096, 65536, MIB)),
    "export-name": ServerOptions(fixed=False),
}


@pytest.mark.parametrize("how", LEGAL)
def test_qemu_and_libnbd_copy_both_ways(scratch: Path, how: str) -> None:
    source = fill(scratch / "source.raw", 64 * MIB, seed=3, pieces=30)
    with served(scratch, LEGAL[how]) as (server, uri):
        qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, uri)
        qemu_img("compare", "-f", "raw", "-F", "raw", source, uri)
        if how != "blocks":  # nbdcopy of that version does not keep to them
            run("nbdcopy", "--requests=32", "--connections=3", uri, scratch / "back.raw")
            qemu_img("compare", "-f", "raw", "-F", "raw", source, scratch / "back.raw")
            if how != "export-name":
                assert len({request.connection for request in server.log}) > 2


def test_nbdinfo_sees_what_is_offered(scratch: Path) -> None:
    bitmaps = {"day": [(MIB, MIB), (5 * MIB, 65536)]}
    options = ServerOptions(description="a mock", bitmaps=bitmaps, blocks=(512, 4096, 2 * MIB))
    with served(scratch, options) as (_, uri):
        export = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
        assert export["export-size"] == 64 * MIB
        assert export["description"] == "a mock"
        assert set(export["contexts"]) == {"base:allocation", "qemu:dirty-bitmap:day"}
        assert [export[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")] == [
            512,
            4096,
            2 * MIB,
        ]
        assert export["can_multi_conn"] and export["can_fast_zero"] and not export["is_read_only"]
        dirty = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:day", uri).stdout)
        assert [(e["offset"], e["length"]) for e in dirty if e["type"] == 1] == bitmaps["day"]


def test_map_flags_and_errors(scratch: Path) -> None:
    with served(scratch, ServerOptions(size=8 * GIB)) as (server, uri):
        qemu_io(uri, "write -P 7 1M 64k", "write -P 8 5G 1M", "write -z 1088k 2M", "flush", "write -f 0 4k")
        found = json.loads(run("nbdinfo", "--json", "--map", uri).stdout)
        data = [(e["offset"], e["length"]) for e in found if e["type"] == 0]
        assert data[1:] == [(MIB, 65536 + 2 * MIB), (5 * GIB, MIB)]
        assert server.commands(Command.WRITE)[-1].flags == CommandFlag.FUA
        qemu_img("map", "-f", "raw", uri)
        assert any(request.flags & CommandFlag.REQ_ONE for request in server.commands(Command.BLOCK_STATUS))
    options = ServerOptions(flags=ALL_FLAGS | TransmissionFlag.READ_ONLY)
    with served(scratch, options) as (_, uri):
        assert "Permission denied" in qemu_io(uri, "write 0 4k", check=False).stderr
        wrong = run("nbdinfo", uri.replace("/disk", "/other"), check=False)
        assert "export: other" in wrong.stderr
    with served(scratch, ServerOptions(tls_required=True)) as (_, uri):
        assert "TLS" in qemu_io(uri, "read 0 4k", check=False).stderr


def test_sparse_disk_is_a_disk() -> None:
    disk = SparseDisk(1 << 40)
    disk.write(65_000, b"x" * 1000)
    disk.zero(65_536, 1 << 39)
    assert disk.read(65_000, 1000) == b"x" * 536 + bytes(464)
    assert list(disk.extents(0, 1 << 20)) == [(65536, True), ((1 << 20) - 65536, False)]
    disk.zero(0, 65_536, hole=False)
    assert list(disk.extents(0, 65_536)) == [(65_536, True)]
    assert list(disk.extents(65_536, 100)) == [(100, False)]
