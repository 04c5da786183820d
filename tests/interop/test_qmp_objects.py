# SPDX-License-Identifier: Apache-2.0
"""Objects, character devices and descriptors over QMP: as qemu-storage-daemon, and what it lacks."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import nbd_uri
from tests.support.qmp import Json, Qmp, QmpError, monitor_argv, qmp_daemon
from tests.support.tools import run

START = [
    *("--chardev", "null,id=none", "--chardev", "ringbuf,id=ring,size=16"),
    *("--object", "iothread,id=io0", "--object", "secret,id=pw,data=abc"),
    *("--blockdev", "null-co,node-name=n,size=1048576"),
]


@pytest.fixture
def qmp(scratch: Path) -> Iterator[Qmp]:
    with qmp_daemon(scratch / "q", *START), Qmp(scratch / "q") as client:
        yield client


# ---- the same as qemu-storage-daemon ----


def call(name: str, **arguments: Any) -> Json:
    return {"execute": name, "arguments": {key.replace("_", "-"): v for key, v in arguments.items()}}


def backend(type: str, **data: Any) -> Json:
    return {"type": type, "data": data}


def unix(path: str, **data: Any) -> Json:
    return backend("socket", addr={"type": "unix", "data": {"path": path}}, **data)


CALLS = [
    call("chardev-add", id="none", backend=backend("null")),
    call("chardev-add", id="new", backend=backend("null")),
    call("chardev-add", id="x", backend={"type": "null"}),
    call("chardev-add", id="x", backend=backend("null", y=1)),
    call("chardev-add", id="x", backend=backend("ringbuf", size=17)),
    call("chardev-add", id="x", backend=backend("ringbuf", size=-1)),
    call("chardev-add", id="old", backend=backend("memory", size=16)),
    call("chardev-add", id="s", backend=unix("s.sock")),
    call("chardev-add", id="x", backend=unix("absent", server=False)),
    call("chardev-add", id="x", backend=unix("x.sock", reconnect=1)),
    call("chardev-add", id="x", backend=unix("no/x.sock")),
    call("chardev-add", id="x", backend=unix("x.sock", server=False, wait=True)),
    call(
        "chardev-add",
        id="abs",
        backend=backend("socket", addr={"type": "unix", "data": {"path": "bt-none", "abstract": True}}),
    ),
    call("chardev-add", id="x", backend=backend("pipe", device="no/pipe")),
    call("chardev-add", id="x", backend=backend("file", out="no/file")),
    call("chardev-add", id="out", backend=backend("file", out="out")),
    call("query-chardev"),
    call("ringbuf-write", device="ring", data="hello"),
    call("ringbuf-read", device="ring", size=3),
    call("ringbuf-read", device="ring", size=300),
    call("ringbuf-read", device="ring", size=0),
    call("ringbuf-write", device="ring", data="0123456789abcdefXYZ"),
    call("ringbuf-read", device="ring", size=100),
    call("ringbuf-write", device="ring", data="aGVsbG8=", format="base64"),
    call("ringbuf-read", device="ring", size=100, format="base64"),
    call("ringbuf-write", device="ring", data="aGVsbG8", format="base64"),
    call("ringbuf-write", device="ring", data="!!", format="base64"),
    call("ringbuf-write", device="ring", data="x", format="nix"),
    call("ringbuf-write", device="none", data="x"),
    call("ringbuf-write", device="nix", data="x"),
    call("ringbuf-read", device="none", size=1),
    call("chardev-send-break", id="none"),
    call("chardev-send-break", id="nix"),
    call("chardev-change", id="nix", backend=backend("null")),
    call("chardev-change", id="mon", backend=backend("null")),
    call("chardev-change", id="new", backend=backend("ringbuf", size=4)),
    call("ringbuf-read", device="new", size=1),
    call("chardev-change", id="new", backend=backend("ringbuf", size=3)),
    call("chardev-remove", id="new"),
    call("chardev-remove", id="mon"),
    call("chardev-remove", id="s"),
    call("chardev-remove", id="s"),
    call("query-chardev"),
    call("qom-list", path="/"),
    call("qom-list", path="/objects"),
    call("qom-list", path="objects"),
    call("qom-list", path="/chardevs/mon"),
    call("qom-list", path="/chardevs/ring"),
    call("qom-list", path="/nix"),
    call("qom-list", path=""),
    call("qom-get", path="/objects", property="io0"),
    call("qom-get", path="/objects/io0", property="type"),
    call("qom-get", path="/objects/io0", property="nix"),
    call("qom-get", path="io0", property="poll-max-ns"),
    call("qom-get", path="/objects/pw", property="data"),
    call("qom-get", path="/chardevs/mon", property="connected"),
    call("qom-get", path="/nix", property="type"),
    call("qom-set", path="/objects/io0", property="poll-max-ns", value=5),
    call("qom-get", path="/objects/io0", property="poll-max-ns"),
    call("qom-set", path="/objects/io0", property="poll-grow", value=3),
    call("qom-set", path="/objects/io0", property="poll-max-ns", value="x"),
    call("qom-set", path="/objects/io0", property="poll-max-ns", value=-1),
    call("qom-set", path="/objects/io0", property="type", value="x"),
    call("qom-set", path="/objects/io0", property="nix", value="x"),
    call("qom-set", path="/objects", property="io0", value="x"),
    call("qom-set", path="/nix", property="nix", value="x"),
    call("qom-set", path="/objects/io0", property="poll-max-ns"),
    call("qom-set", path="/objects/pw", property="data", value="def"),
    call("qom-get", path="/objects/pw", property="data"),
    call("qom-list-properties", typename="nix"),
    call("qom-list-properties", typename="chardev-socket"),
    call("qom-list-properties", typename="pr-manager-helper"),
    call("qom-list-types", implements="nix"),
    call("object-add", qom_type="iothread", id="io0"),
    call("object-add", qom_type="iothread", id="1bad"),
    call("object-add", qom_type="nix", id="a"),
    call("object-add", qom_type="iothread", id="io1", poll_max_ns=-1),
    call("object-add", qom_type="iothread", id="io1", nix=1),
    call("object-add", qom_type="iothread", id="io1"),
    call("object-add", id="s1"),
    call("object-add", qom_type="iothread"),
    call("object-del", id="nix"),
    call("object-del", id="io1"),
    call("object-del", id="pw"),
    call("qom-list", path="/objects"),
]


def plain(answer: Json) -> Json:
    """Without what is free to differ: the order of lists of things with names."""
    found = answer.get("return")
    if isinstance(found, list):
        key = "label" if found and "label" in found[0] else "name"
        answer = {"return": sorted(found, key=lambda item: str(item[key]))}
    return answer


def test_the_same_answers(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[Json]] = []
    for name in ("theirs", "ours"):
        directory = scratch / name
        directory.mkdir()
        monkeypatch.chdir(directory)
        with _server(name, directory), Qmp(Path("q")) as client:
            answers.append([plain(client.ask(message)) for message in CALLS])
    differences = [
        (json.dumps(asked), wanted, found)
        for asked, wanted, found in zip(CALLS, *answers, strict=True)
        if wanted != found
    ]
    assert differences == []


@contextlib.contextmanager
def _server(name: str, directory: Path) -> Iterator[None]:
    if name == "ours":
        with qmp_daemon(Path("q"), *START):
            yield
        return
    argv = ["qemu-storage-daemon", *monitor_argv(Path("q")), *START, "--pidfile", "pid"]
    with subprocess.Popen(argv) as process:
        try:
            end = time.monotonic() + 10
            while not (directory / "pid").exists() and time.monotonic() < end:
                time.sleep(0.02)
            yield
        finally:
            process.kill()


# ---- what it does not have ----


def test_properties_of_several_objects_at_once(qmp: Qmp) -> None:
    (thread, ring) = qmp.execute("qom-list-get", paths=["/objects/io0", "/chardevs/ring"])
    values = {item["name"]: item.get("value") for item in thread["properties"]}
    assert values == {
        "type": "iothread",
        "poll-max-ns": 32768,
        "poll-grow": 0,
        "poll-shrink": 0,
        "aio-max-batch": 0,
    }
    assert ring["properties"] == [{"name": "type", "type": "string", "value": "chardev-ringbuf"}]


def test_types_and_what_they_derive_from(qmp: Qmp) -> None:
    names = {item["name"]: item for item in qmp.execute("qom-list-types", abstract=True)}
    assert names["iothread"] == {"name": "iothread", "parent": "event-loop-base"}
    assert names["chardev"] == {"name": "chardev", "parent": "object", "abstract": True}
    creatable = {item["name"] for item in qmp.execute("qom-list-types", implements="user-creatable")}
    assert {"iothread", "secret", "pr-manager-helper"} <= creatable
    assert not any(name.startswith("chardev") for name in creatable)
    for name in names:
        assert qmp.execute("qom-list-properties", typename=name)[0] == {"name": "type", "type": "string"}


def test_threads_come_and_go(qmp: Qmp) -> None:
    """More often than there are threads at a time; the process does not grow."""

    def threads() -> int:
        (one,) = (t for t in qmp.execute("query-iothreads") if t["id"] == "io0")
        return len(os.listdir(f"/proc/{_process(one['thread-id'])}/task"))

    qmp.execute("object-add", qom_type="iothread", id="io1")
    before = threads()
    qmp.execute("object-del", id="io1")
    for i in range(100):
        qmp.execute("object-add", qom_type="iothread", id=f"t{i}", poll_max_ns=i)
        found = {item["id"]: item for item in qmp.execute("query-iothreads")}
        assert found[f"t{i}"]["poll-max-ns"] == i
        assert found[f"t{i}"]["thread-id"] != found["io0"]["thread-id"]
        qmp.execute("object-del", id=f"t{i}")
    assert threads() == before
    made = 0
    with pytest.raises(QmpError, match="iothread 'many"):
        for made in range(100):
            qmp.execute("object-add", qom_type="iothread", id=f"many{made}")
    assert made >= 10
    for i in range(made):
        qmp.execute("object-del", id=f"many{i}")
    assert [item["id"] for item in qmp.execute("query-iothreads")] == ["io0"]


def _process(thread: int) -> int:
    status = Path(f"/proc/{thread}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Tgid:")).split()[1])


def test_a_thread_that_serves_is_kept(scratch: Path) -> None:
    export = ["--export", "nbd,id=e,node-name=n,iothread=io0"]
    server = ["--nbd-server", f"addr.type=unix,addr.path={scratch}/nbd"]
    with qmp_daemon(scratch / "q", *START, *server, *export), Qmp(scratch / "q") as qmp:
        with pytest.raises(QmpError, match="GenericError: object 'io0' is in use, can not be deleted"):
            qmp.execute("object-del", id="io0")
        qmp.execute("qom-set", path="/objects/io0", property="poll-max-ns", value=0)
        run("nbdcopy", nbd_uri(scratch / "nbd", "n"), "null:")
        assert qmp.execute("query-iothreads")[0]["poll-max-ns"] == 0


def test_object_actions_are_undone(qmp: Qmp) -> None:
    before = qmp.execute("qom-list", path="/objects")
    actions = [
        {"type": "object-add", "data": {"qom-type": "iothread", "id": "io1"}},
        {"type": "qom-set", "data": {"path": "/objects/io0", "property": "poll-max-ns", "value": 7}},
        {"type": "object-del", "data": {"id": "pw"}},
    ]
    with pytest.raises(QmpError):
        qmp.execute("transaction", actions=[*actions, {"type": "abort", "data": {}}])
    assert qmp.execute("qom-list", path="/objects") == before
    assert qmp.execute("qom-get", path="/objects/io0", property="poll-max-ns") == 32768
    qmp.execute("transaction", actions=actions)
    assert [item["name"] for item in qmp.execute("qom-list", path="/objects")] == ["type", "io0", "io1"]
    assert qmp.execute("qom-get", path="/objects/io0", property="poll-max-ns") == 7


# ---- descriptors ----


def send(qmp: Qmp, fds: list[int], name: str, **arguments: Any) -> Any:
    """Runs a command with descriptors beside it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    qmp.socket.sendmsg([json.dumps(call(name, **arguments)).encode()], rights)
    answer = qmp.answer()
    if "error" in answer:
        raise QmpError(answer["error"])
    return answer["return"]


def opened(path: Path, flags: int) -> int:
    return os.open(path, flags)


def test_sets_of_descriptors(qmp: Qmp, scratch: Path) -> None:
    disk = scratch / "disk"
    disk.write_bytes(bytes(1 << 20))
    reader, writer = os.open(disk, os.O_RDONLY), os.open(disk, os.O_RDWR)
    with pytest.raises(QmpError, match="No file descriptor supplied via SCM_RIGHTS"):
        qmp.execute("add-fd")
    first = send(qmp, [reader], "add-fd", opaque="r")
    assert first["fdset-id"] == 0
    with pytest.raises(QmpError, match="Failed to find file descriptor with matching flags=0x2"):
        qmp.execute("blockdev-add", driver="file", node_name="f", filename="/dev/fdset/0")
    second = send(qmp, [writer], "add-fd", fdset_id=0)
    other = send(qmp, [reader], "add-fd")
    assert other["fdset-id"] == 1
    assert qmp.execute("query-fdsets") == [
        {"fdset-id": 0, "fds": [{"fd": first["fd"], "opaque": "r"}, {"fd": second["fd"]}]},
        {"fdset-id": 1, "fds": [{"fd": other["fd"]}]},
    ]
    os.close(reader)
    os.close(writer)
    disk.unlink()  # what was passed is all there is
    qmp.execute("blockdev-add", driver="file", node_name="f", filename="/dev/fdset/0")
    qmp.execute(
        "blockdev-add", driver="file", node_name="g", filename="/dev/fdset/1", read_only=True, locking="off"
    )
    qmp.execute("remove-fd", fdset_id=1)
    qmp.execute("remove-fd", fdset_id=0, fd=first["fd"])
    assert [item["fdset-id"] for item in qmp.execute("query-fdsets")] == [0, 1]
    qmp.execute("blockdev-del", node_name="g")
    assert [item["fdset-id"] for item in qmp.execute("query-fdsets")] == [0]
    with pytest.raises(QmpError, match="File descriptor named 'fdset-id:7, fd:3' not found"):
        qmp.execute("remove-fd", fdset_id=7, fd=3)
    with pytest.raises(QmpError, match="expects a non-negative value"):
        send(qmp, [0], "add-fd", fdset_id=-1)
    qmp.execute("blockdev-del", node_name="f")


def test_sets_without_users_go_with_the_last_client(qmp: Qmp, scratch: Path) -> None:
    send(qmp, [0], "add-fd")
    with Qmp(scratch / "q") as second:
        qmp.close()
        time.sleep(0.2)
        assert len(second.execute("query-fdsets")) == 1
    time.sleep(0.2)
    with Qmp(scratch / "q") as third:
        assert third.execute("query-fdsets") == []


def test_names_for_descriptors(qmp: Qmp, scratch: Path) -> None:
    with pytest.raises(QmpError, match="Parameter 'fdname' expects a name not starting with a digit"):
        send(qmp, [0], "getfd", fdname="1x")
    send(qmp, [0], "getfd", fdname="x")
    qmp.execute("closefd", fdname="x")
    with pytest.raises(QmpError, match="File descriptor named 'x' not found"):
        qmp.execute("closefd", fdname="x")


def test_names_are_those_of_a_monitor(scratch: Path) -> None:
    second = ("--chardev", f"socket,id=two,path={scratch / 'two'},server=on,wait=off", "--monitor", "two")
    with qmp_daemon(scratch / "q", *second), Qmp(scratch / "q") as one, Qmp(scratch / "two") as two:
        for client in (one, two):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(scratch / f"of{id(client)}"))
                listener.listen()
                send(client, [listener.fileno()], "getfd", fdname="mine")
        fd = {"type": "fd", "data": {"str": "mine"}}
        one.execute("chardev-add", id="c", backend=backend("socket", addr=fd))
        with socket.socket(socket.AF_UNIX) as client_of_one:
            client_of_one.connect(str(scratch / f"of{id(one)}"))
        with pytest.raises(QmpError, match="File descriptor named 'mine' has not been found"):
            one.execute("chardev-add", id="d", backend=backend("socket", addr=fd))
        with pytest.raises(QmpError, match="File descriptor named 'mine' not found"):
            one.execute("closefd", fdname="mine")
        two.execute("closefd", fdname="mine")
        send(two, [0], "getfd", fdname="kept")
        two.close()
        with Qmp(scratch / "two") as again:  # the monitor is the same
            again.execute("closefd", fdname="kept")


def test_a_named_socket_listens(qmp: Qmp, scratch: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scratch / "passed"))
        listener.listen()
        send(qmp, [listener.fileno()], "getfd", fdname="mine")
    fd = {"type": "fd", "data": {"str": "mine"}}
    qmp.execute("chardev-add", id="c", backend=backend("socket", addr=fd))
    with pytest.raises(QmpError, match="File descriptor named 'mine' has not been found"):
        qmp.execute("chardev-add", id="d", backend=backend("socket", addr=fd))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(scratch / "passed"))


def test_named_sockets_of_exports(qmp: Qmp, scratch: Path) -> None:
    for name in ("nbd", "vhost"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(scratch / name))
            listener.listen()
            send(qmp, [listener.fileno()], "getfd", fdname=name)
    qmp.execute("nbd-server-start", addr={"type": "fd", "data": {"str": "nbd"}})
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n")
    run("nbdcopy", nbd_uri(scratch / "nbd", "n"), "null:")
    address = {"type": "fd", "str": "vhost"}
    qmp.execute("block-export-add", type="vhost-user-blk", id="v", node_name="n", addr=address)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(scratch / "vhost"))
    with pytest.raises(QmpError, match="File descriptor named 'vhost' has not been found"):
        qmp.execute("block-export-add", type="vhost-user-blk", id="w", node_name="n", addr=address)


def test_descriptors_are_bounded(qmp: Qmp) -> None:
    process = _process(qmp.execute("query-iothreads")[0]["thread-id"])
    with pytest.raises(QmpError, match="At most 512 file descriptors can be kept"):
        for _ in range(600):
            send(qmp, [0] * 16, "add-fd")
    assert len(os.listdir(f"/proc/{process}/fd")) < 700
