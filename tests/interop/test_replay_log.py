# SPDX-License-Identifier: Apache-2.0
"""Logs made by QEMU's blklogwrites and by ours for the same requests, and the command that replays them."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from target.replay import WriteLog, rebuild
from tests.support.daemon import blocktarget_argv
from tests.support.qcow2 import running_graph
from tests.support.tools import qemu_io, run

MIB = 1 << 20
COMMANDS = (
    "write -P 1 0 4k",
    "write -P 7 100 1000",
    "flush",
    "write -z 8k 4k",
    "discard 12k 4k",
    "write -P 5 1k 512",
)


def log_by_qemu(scratch: Path) -> Path:
    image, log = scratch / "q.raw", scratch / "q.log"
    image.write_bytes(b"\xee" * MIB)
    log.touch()
    words = f"driver=blklogwrites,discard=unmap,file.driver=file,file.filename={image},file.discard=unmap"
    arguments = [item for command in (*COMMANDS, "flush") for item in ("-c", command)]
    run("qemu-io", "--image-opts", f"{words},log.driver=file,log.filename={log}", *arguments)
    return log


async def log_by_us(scratch: Path) -> Path:
    image, log = scratch / "o.raw", scratch / "o.log"
    image.write_bytes(b"\xee" * MIB)
    log.touch()
    files = {
        name: {"driver": "file", "filename": str(path)} for name, path in (("file", image), ("log", log))
    }
    async with running_graph() as graph:
        node = await graph.add({"driver": "blklogwrites", "node-name": "log", "discard": "unmap", **files})
        await node.object.write(0, b"\1" * 4096)
        await node.object.write(100, b"\7" * 1000)
        await node.object.flush()
        await node.object.zeroes(8192, 4096)
        await node.object.discard(12288, 4096)
        await node.object.write(1024, b"\5" * 512)
        await node.object.flush()
    return log


def entries(path: Path) -> list[tuple[int, int, int, bytes]]:
    """What was logged; QEMU may flush more often than it was asked to."""
    with WriteLog(path) as log:
        all = [(int(e.flags), e.offset, e.length, log.data(e) if e.is_write else b"") for e in log.entries]
    return [entry for entry, before in zip(all, [None, *all], strict=False) if entry != before]


async def test_both_log_the_same(scratch: Path) -> None:
    assert entries(await log_by_us(scratch)) == entries(log_by_qemu(scratch))
    assert (scratch / "o.raw").read_bytes() == (scratch / "q.raw").read_bytes()


def test_a_log_of_qemus_rebuilds_its_image(scratch: Path) -> None:
    log = log_by_qemu(scratch)
    copy = scratch / "copy"
    copy.write_bytes(b"\xee" * MIB)
    with WriteLog(log) as opened:
        rebuild(opened, copy)
    assert copy.read_bytes() == (scratch / "q.raw").read_bytes()


def test_qemu_appends_to_our_log(scratch: Path) -> None:
    """It walks over our entries to find the end."""
    log = asyncio.run(log_by_us(scratch))
    with WriteLog(log) as opened:
        before = [str(entry) for entry in opened.entries]
    words = f"driver=blklogwrites,file.driver=file,file.filename={scratch / 'o.raw'},log-append=on"
    run(
        "qemu-io",
        "--image-opts",
        f"{words},log.driver=file,log.filename={log}",
        "-c",
        "write -P 9 64k 512",
        "-c",
        "flush",
    )
    with WriteLog(log) as opened:
        after = [str(entry) for entry in opened.entries]
    assert after[: len(before)] == before
    assert after[len(before)] == f"{len(before)} write 65536 512"


def replay(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(*blocktarget_argv("replay-log", *words), check=False)


@pytest.fixture
def copy(scratch: Path) -> Path:
    path = scratch / "copy"
    path.write_bytes(b"\xee" * MIB)
    return path


def test_the_command_lists_and_replays(scratch: Path, copy: Path) -> None:
    log = log_by_qemu(scratch)
    listed = replay(log, "--list")
    assert listed.returncode == 0
    assert listed.stdout.startswith("0 write 0 4096\n1 write 0 1536\n2 flush\n")
    assert replay(log, copy, "--flush", "1").returncode == 0
    qemu_io(copy, "read -P 7 100 1000", "read -P 0xee 8k 8k")
    assert replay(log, copy, "--until", "2", "--lose").returncode == 0
    assert replay(log, copy).returncode == 0
    assert copy.read_bytes() == (scratch / "q.raw").read_bytes()


def test_the_command_loses_what_was_not_flushed(scratch: Path, copy: Path) -> None:
    log = log_by_qemu(scratch)
    with WriteLog(log) as opened:
        last = max(entry.number for entry in opened.entries if entry.is_write) + 1
    assert replay(log, copy, "--until", str(last), "--lose").returncode == 0
    qemu_io(copy, "read -P 7 100 924", "read -P 7 1024 76", "read -P 1 1100 2996", "read -P 0xee 4k 60k")
    assert (
        replay(
            log, copy, "--until", str(last), "--seed", "3", "--keep", "1", "--discard", "poison"
        ).returncode
        == 0
    )
    qemu_io(copy, "read -P 5 1k 512", "read -P 0 8k 4k", "read -P 0xdc 12k 4k")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--until", "1000"], "option --until: the log has"),
        (["--until", "-1"], "option --until: expects a number, not '-1'"),
        (["--flush", "0"], "option --flush: the log has"),
        (["--flush", "1", "--until", "1"], "options --until and --flush exclude each other"),
        (["--lose", "--seed", "1"], "options --lose and --seed exclude each other"),
        (["--keep", "0.1"], "option --keep needs --seed"),
        (["--seed", "1", "--keep", "2"], "option --keep: expects a number from 0 to 1, not '2'"),
        (["--mark", "x"], "there is no mark 'x'"),
        (["--discard", "x"], "option --discard: expects keep, zero or poison"),
        (["extra"], "a log and an image are expected"),
    ],
)
def test_the_command_refuses_by_name(scratch: Path, copy: Path, words: list[str], message: str) -> None:
    done = replay(log_by_qemu(scratch), copy, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert copy.read_bytes() == b"\xee" * MIB


def test_the_command_names_files_that_it_cannot_open(scratch: Path, copy: Path) -> None:
    assert f"{scratch / 'no'}: Could not open" in replay(scratch / "no", copy).stderr
    assert f"{copy}: Invalid log superblock magic" in replay(copy, copy).stderr
    assert f"{scratch / 'no'}: No such file" in replay(log_by_qemu(scratch), scratch / "no").stderr
