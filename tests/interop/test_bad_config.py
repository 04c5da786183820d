# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong: one clear line that names node or export and option, status 1, nothing left.

The same mistakes made while a target serves are in test_bad_input_live.py.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import (
    Daemon,
    blockdev,
    blocktarget_argv,
    daemon_argv,
    image_node,
    nbd_export,
    nbd_server_unix,
    nbd_uri,
    vhost_user_export,
)
from tests.support.tools import create_image, qemu_img, run

Start = Callable[..., Daemon]
SECONDS = 20


def refused(argv: list[str], scratch: Path) -> str:
    """Asserts status 1, one line on stderr and nothing new in the directory; returns the line."""
    before = sorted(os.listdir(scratch))
    pidfile = scratch / "pid"
    done = subprocess.run(
        [*argv, "--pidfile", str(pidfile)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        cwd=scratch,
    )
    assert done.returncode == 1, f"ended with {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("blocktarget: ")
    assert sorted(os.listdir(scratch)) == before
    return line


def refused_daemon(scratch: Path, *argv: str) -> str:
    return refused([*daemon_argv(), *argv], scratch)


def refused_file(scratch: Path, text: str) -> str:
    path = scratch / "graph.yaml"
    path.write_text(text)
    return refused(blocktarget_argv("serve", path), scratch)


def expect(line: str, *words: str) -> None:
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


# ---- options and the graph ----

FILE = {"driver": "file", "filename": "disk.raw"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"driver": "nothing"}, ["nothing"]),
        ({"driver": "file"}, ["filename"]),
        ({**FILE, "filenam": "x"}, ["filenam"]),
        ({"driver": "file", "filename": 7}, ["filename"]),
        ({"driver": "file", "filename": "missing.raw"}, ["'disk'", "missing.raw", "No such file"]),
        ({"driver": "file", "filename": "."}, ["'disk'", "'.'"]),
        ({**FILE, "aio": "native"}, ["'disk'", "aio=native", "cache.direct"]),
        ({**FILE, "aio": "posix"}, ["aio", "posix"]),
        ({**FILE, "detect-zeroes": "unmap"}, ["'disk'", "detect-zeroes", "unmap"]),
        ({"driver": "host_device", "filename": "disk.raw"}, ["'disk'", "disk.raw"]),
        ({"driver": "raw", "file": "absent"}, ["absent"]),
        ({"driver": "qcow2", "file": "disk"}, ["'disk'", "Cannot find"]),
        ({"driver": "raw", "file": {"driver": "raw", "file": "disk"}}, ["'disk'", "Cannot find"]),
        ({"driver": "raw", "file": FILE, "offset": 4 << 20}, ["'disk'", "offset"]),
        ({"driver": "raw", "file": FILE, "size": 777}, ["'disk'", "size"]),
        ({"driver": "raw", "file": FILE, "size": 2 << 20}, ["'disk'", "size"]),
        ({"driver": "qcow2", "file": FILE}, ["'disk'", "qcow2"]),
        ({"driver": "null-co", "size": -1}, ["size"]),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value)[:50],
)
def test_bad_blockdev(scratch: Path, options: dict[str, Any], words: list[str]) -> None:
    (scratch / "disk.raw").write_bytes(b"\0" * (1 << 20))
    argv = ["--blockdev", json.dumps({"node-name": "disk", **options})]
    expect(refused_daemon(scratch, *argv).lower(), *(word.lower() for word in words))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--blockdev", "driver=null-co,node-name=n,size=lots"], ["size"]),
        (["--blockdev", "driver=null-co,node-name=n,read-zeroes=maybe"], ["read-zeroes"]),
        (["--blockdev", "driver=null-co"], ["node-name"]),
        (["--blockdev", "{not json"], ["JSON"]),
        (["--blockdev", "driver=null-co,node-name=n", "--blockdev", "driver=null-co,node-name=n"], ["n"]),
        (["--export", "type=nbd,id=e,node-name=absent"], ["'e'"]),
        (["--export", "type=tape,id=e,node-name=n"], ["tape"]),
        (["--object", "engine,id=o"], ["engine"]),
        (["--object", "iothread,id=o,colour=red"], ["colour"]),
        (["--chardev", "socket,id=c,path=x"], ["chardev"]),
        (["--monitor", "chardev=c"], ["monitor"]),
        (["--nonsense"], ["nonsense"]),
        (["word"], ["word"]),
    ],
    ids=lambda value: " ".join(value)[:50] if value[0].startswith("-") else None,
)
def test_bad_command_line(scratch: Path, argv: list[str], words: list[str]) -> None:
    expect(refused_daemon(scratch, *argv), *words)


def test_export_of_a_node_that_is_not_there(scratch: Path) -> None:
    argv = [*nbd_server_unix(scratch / "s"), *nbd_export(node="absent")]
    expect(refused_daemon(scratch, *argv), "'nbd-disk'", "absent")


def test_writable_export_of_a_read_only_node(scratch: Path) -> None:
    node = blockdev(driver="null-co", node_name="disk", read_only=True)
    line = refused_daemon(scratch, *node, *nbd_server_unix(scratch / "s"), *nbd_export())
    expect(line, "'nbd-disk'", "read-only", "writable")


def test_second_export_with_the_same_id(scratch: Path) -> None:
    node = blockdev(driver="null-co", node_name="disk")
    line = refused_daemon(scratch, *node, *nbd_server_unix(scratch / "s"), *nbd_export(), *nbd_export())
    expect(line, "nbd-disk", "in use")


def test_unknown_iothread(scratch: Path) -> None:
    node = blockdev(driver="null-co", node_name="disk")
    export = f"type=vhost-user-blk,id=v,node-name=disk,addr.type=unix,addr.path={scratch}/v,iothread=absent"
    expect(refused_daemon(scratch, *node, "--export", export), "'v'", "iothread", "absent")


def test_export_options_of_another_type(scratch: Path) -> None:
    node = blockdev(driver="null-co", node_name="disk")
    export = "type=nbd,id=e,node-name=disk,num-queues=2"
    expect(refused_daemon(scratch, *node, "--export", export), "num-queues")


# ---- sockets ----


def test_tcp_port_in_use(scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused_daemon(scratch, "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}")
    expect(line, str(port), "in use")


@pytest.mark.parametrize("kind", ["nbd", "vhost"])
def test_live_unix_socket(scratch: Path, kind: str) -> None:
    path = scratch / "live.sock"
    node = blockdev(driver="null-co", node_name="disk")
    argv = [*nbd_server_unix(path), *nbd_export()] if kind == "nbd" else vhost_user_export(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        expect(refused_daemon(scratch, *node, *argv), str(path), "in use")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_socket_path_that_is_a_file(scratch: Path) -> None:
    path = scratch / "precious"
    path.write_text("data")
    expect(refused_daemon(scratch, *nbd_server_unix(path)), str(path))
    assert path.read_text() == "data"


def test_socket_in_a_directory_that_is_not_there(scratch: Path) -> None:
    path = scratch / "absent" / "sock"
    expect(refused_daemon(scratch, *nbd_server_unix(path)), str(path))


def test_socket_name_too_long(scratch: Path) -> None:
    expect(refused_daemon(scratch, *nbd_server_unix(scratch / ("x" * 120))), "x" * 20)


def test_stale_socket_is_replaced(scratch: Path, start: Start) -> None:
    path = scratch / "stale.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    daemon = start(*blockdev(driver="null-co", node_name="disk"), *nbd_server_unix(path), *nbd_export())
    run("nbdinfo", nbd_uri(path))
    daemon.stop()
    assert not path.exists()


def test_first_of_two_exports_leaves_no_socket_when_the_second_fails(scratch: Path) -> None:
    node = blockdev(driver="null-co", node_name="disk")
    first = [*nbd_server_unix(scratch / "n.sock"), *vhost_user_export(scratch / "v.sock")]
    line = refused_daemon(scratch, *node, *first, *nbd_export(node="absent"))
    expect(line, "'nbd-disk'", "absent")


# ---- locks ----


def test_image_that_another_program_writes(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        holder.stdin.write("length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        sock = scratch / "s"
        line = refused_daemon(scratch, *image_node(image, "qcow2"), *nbd_server_unix(sock), *nbd_export())
        expect(line, "'disk'", "lock", "disk.qcow2")
    finally:
        holder.communicate("quit\n", timeout=SECONDS)


def test_image_that_this_target_writes(scratch: Path, start: Start) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    node = image_node(image, "qcow2")
    start(*node, *nbd_server_unix(scratch / "s"), *nbd_export())
    line = refused_daemon(scratch, *node, *nbd_server_unix(scratch / "t"), *nbd_export())
    expect(line, "'disk'", "lock")
    done = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", image, check=False)
    assert done.returncode != 0 and "lock" in done.stderr
    run("qemu-io", "-U", "-r", "-f", "qcow2", "-c", "read 0 512", image)


# ---- qcow2 images ----


def patch(path: Path, offset: int, form: str, value: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(struct.pack(form, value))


# Offsets are those of the specification's header: docs/interop/qcow2.txt, "Header".
HEADER_FIELDS: dict[str, tuple[int, str, int]] = {
    "magic": (0, ">I", 0x51464900),
    "version-0": (4, ">I", 0),
    "version-4": (4, ">I", 4),
    "backing-name-offset": (8, ">Q", 1 << 60),
    "cluster-bits-8": (20, ">I", 8),
    "cluster-bits-31": (20, ">I", 31),
    "size-past-l1": (24, ">Q", 1 << 62),
    "encryption": (32, ">I", 1),
    "encryption-unknown": (32, ">I", 77),
    "l1-entries-huge": (36, ">I", 0x7FFFFFFF),
    "l1-unaligned": (40, ">Q", 0x30001),
    "l1-overflow": (40, ">Q", 0xFFFFFFFFFFFF0000),
    "refcount-table-unaligned": (48, ">Q", 0x10200),
    "refcount-table-huge": (56, ">I", 0x7FFFFFFF),
    "refcount-table-none": (56, ">I", 0),
    "snapshots-many": (60, ">I", 0x7FFFFFFF),
    "incompatible-unknown": (72, ">Q", 1 << 40),
    "refcount-order-7": (96, ">I", 7),
    "header-length-short": (100, ">I", 80),
    "header-length-huge": (100, ">I", 1 << 30),
}


def corrupt_header(image: Path, name: str) -> None:
    """One of HEADER_FIELDS gets its bad value, and others what it takes for that to matter."""
    if name == "backing-name-offset":
        patch(image, 16, ">I", 100)
    if name == "snapshots-many":
        patch(image, 64, ">Q", 0x10000)
    patch(image, *HEADER_FIELDS[name])


@pytest.mark.parametrize("name", HEADER_FIELDS)
def test_corrupt_qcow2_header(scratch: Path, name: str) -> None:
    image = create_image(scratch / "disk.qcow2", "64M")
    corrupt_header(image, name)
    server = nbd_server_unix(scratch / "s")
    expect(refused_daemon(scratch, *image_node(image, "qcow2"), *server, *nbd_export()), "'disk'")


@pytest.mark.parametrize("length", [0, 3, 8, 71, 90, 103])
def test_truncated_qcow2_header(scratch: Path, length: int) -> None:
    image = create_image(scratch / "disk.qcow2", "64M")
    os.truncate(image, length)
    expect(refused_daemon(scratch, *image_node(image, "qcow2")), "'disk'")


def test_feature_that_is_not_built_is_named(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "64M", options="extended_l2=on,cluster_size=128k")
    line = refused_daemon(scratch, *image_node(image, "qcow2"))
    expect(line.lower(), "'disk'", "extended l2")


def set_backing(path: Path, name: str) -> None:
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", path)


def test_backing_file_that_is_not_there(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    set_backing(image, "absent.qcow2")
    expect(refused_daemon(scratch, *image_node(image, "qcow2")), "'disk'", "absent.qcow2")


def test_image_that_backs_itself(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    set_backing(image, "disk.qcow2")
    expect(refused_daemon(scratch, *image_node(image, "qcow2")), "'disk'", "backing")


def test_backing_loop(scratch: Path) -> None:
    for name in ("a", "b", "c"):
        create_image(scratch / f"{name}.qcow2", "1M")
    for name, backing in (("a", "b"), ("b", "c"), ("c", "b")):
        set_backing(scratch / f"{name}.qcow2", f"{backing}.qcow2")
    expect(refused_daemon(scratch, *image_node(scratch / "a.qcow2", "qcow2")), "'disk'", "backing")


def test_backing_format_that_does_not_fit(scratch: Path) -> None:
    (scratch / "base.raw").write_bytes(b"\0" * (1 << 20))
    image = create_image(scratch / "disk.qcow2", "1M")
    set_backing(image, "base.raw")
    expect(refused_daemon(scratch, *image_node(image, "qcow2")), "'disk'", "backing", "qcow2")


def test_backing_driver_that_is_unknown(scratch: Path) -> None:
    image = create_image(scratch / "disk.qcow2", "1M")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow", image)
    line = refused_daemon(scratch, *image_node(image, "qcow2"))
    expect(line, "'disk'", "qcow")


# ---- the YAML file ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("blockdevs: [", ["graph.yaml"]),
        ("- a\n- b\n", ["graph.yaml"]),
        ("disks: []\n", ["disks"]),
        ("blockdevs: 7\n", ["blockdevs"]),
        ("blockdevs:\n  - {driver: nothing, node-name: n}\n", ["nothing"]),
        ("blockdevs:\n  - {driver: null-co, node-name: n, colour: red}\n", ["colour"]),
        ("blockdevs:\n  - {driver: null-co, node-name: n, size: -5}\n", ["size"]),
        ("blockdevs:\n  - {driver: file, node-name: n, filename: absent}\n", ["'n'", "absent"]),
        ("exports:\n  - {type: nbd, id: e, node-name: absent}\n", ["'e'"]),
        ("a: &a [*a]\n", []),
        ("blockdevs: !!python/object/apply:os.system [touch hacked]\n", []),
    ],
)
def test_bad_file(scratch: Path, text: str, words: list[str]) -> None:
    expect(refused_file(scratch, text), *words)
    assert not (scratch / "hacked").exists()


def test_file_that_is_not_there(scratch: Path) -> None:
    line = refused(blocktarget_argv("serve", scratch / "absent.yaml"), scratch)
    expect(line, "absent.yaml", "No such file")
