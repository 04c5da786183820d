# SPDX-License-Identifier: Apache-2.0
"""``blocktarget graph`` on a running target, and on qemu-storage-daemon; and what goes wrong."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.daemon import Daemon, blockdev, blocktarget_argv, nbd_export, nbd_server_unix
from tests.support.qmp import monitor_argv
from tests.support.tools import create_image

SVG = "{http://www.w3.org/2000/svg}"


def graph(*argv: str | Path, status: int = 0) -> str:
    done = subprocess.run(blocktarget_argv("graph", *argv), capture_output=True, text=True, timeout=30)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(params=["blocktarget", "qemu-storage-daemon"])
def target(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Daemon]:
    """A qcow2 image with a backing file that another export reads."""
    create_image(scratch / "base", "64M")
    create_image(scratch / "overlay", "64M", backing=scratch / "base")
    base = {"driver": "file", "node-name": "base-file", "filename": str(scratch / "base")}
    overlay = {"driver": "file", "node-name": "disk-file", "filename": str(scratch / "overlay")}
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "blocktarget":
            patch.setenv("BLOCKTARGET_TEST_DAEMON", request.param)
        daemon = Daemon(
            *monitor_argv(scratch / "qmp.sock"),
            *blockdev(driver="qcow2", node_name="base", file=base, read_only=True),
            *blockdev(driver="qcow2", node_name="disk", file=overlay, backing="base"),
            *nbd_server_unix(scratch / "nbd.sock"),
            *nbd_export(node="disk", name="disk"),
            *nbd_export(node="base", name="base", writable=False),
        )
    try:
        yield daemon.wait_ready()
        daemon.stop()
    finally:
        daemon.kill()


@contextmanager
def reader(scratch: Path) -> Iterator[None]:
    """A client that reads the disk all the time."""
    uri = f"nbd+unix:///disk?socket={scratch / 'nbd.sock'}"
    code = f"import nbd; h = nbd.NBD(); h.connect_uri({uri!r}); print('on', flush=True)\n" + (
        "while True: h.pread(4096, 0)"
    )
    with subprocess.Popen(["/usr/bin/python3", "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"on\n"
            yield
        finally:
            process.kill()


@pytest.mark.usefixtures("target")
def test_all_forms(scratch: Path) -> None:
    where = ("-s", scratch / "qmp.sock", "--interval", "0")
    text = graph(*where)
    for words in (
        "nbd-disk",
        "└─ disk",
        "file: disk-file",
        "backing: base",
        "(see above)",
        "64 MiB",
        "read-only",
    ):
        assert words in text
    assert "rw-s / r-u-" in text  # a format's file
    root = ElementTree.fromstring(graph(*where, "-f", "svg"))
    drawn = {element.text for element in root.iter(f"{SVG}text")}
    assert {"nbd-disk", "nbd-base", "disk", "base", "disk-file", "base-file", "qcow2", "backing"} <= drawn
    assert graph(*where, "-f", "dot").startswith("digraph")
    assert graph(*where, "-f", "mermaid").startswith("flowchart")
    assert graph(*where, "-o", scratch / "out.svg") == ""
    assert ElementTree.parse(scratch / "out.svg").getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize("target", ["blocktarget"], indirect=True)
@pytest.mark.usefixtures("target")
def test_traffic(scratch: Path) -> None:
    """QEMU counts nothing for nodes."""
    with reader(scratch):
        text = graph("-s", scratch / "qmp.sock", "-i", "0.5")
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("nbd")}
    assert re.search(r"read [0-9.]+ [KM]iB/s, [0-9.]+k?/s$", rows["nbd-disk"])
    assert "iB/s" not in rows["nbd-base"]
    [disk] = [line for line in text.splitlines() if line.startswith("└─ disk ")]
    assert re.search(r"read [0-9.]+ [KM]iB/s", disk)
    assert "traffic over 0.5 s" in text
    [client] = [line for line in text.splitlines() if "◦" in line]
    assert re.search(r"[0-9]+ requests", client)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-s", "/nowhere.sock"], "graph: Could not connect to '/nowhere.sock': No such file or directory"),
        (["-f", "png"], "graph: option --format: 'png' is none of text, svg, dot, mermaid"),
        (["-i", "-1"], "graph: option --interval: '-1' is no number of seconds up to 3600"),
        (["-i", "nan"], "graph: option --interval: 'nan' is no number"),
        (["extra"], "graph: extra: Unexpected argument"),
        (["--bad"], "unrecognized option '--bad'"),
    ],
)
def test_what_is_refused(argv: list[str], words: str) -> None:
    assert words in graph(*argv, status=1)


def test_something_else_behind_the_socket(scratch: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scratch / "s"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert graph("-s", scratch / "s", status=1).startswith("blocktarget: graph: ")
        thread.join()


@pytest.mark.usefixtures("target")
def test_a_file_that_cannot_be_written(scratch: Path) -> None:
    error = graph("-s", scratch / "qmp.sock", "-i", "0", "-o", scratch / "missing" / "x.svg", status=1)
    assert "No such file or directory" in error
