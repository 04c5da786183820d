# SPDX-License-Identifier: Apache-2.0
"""Bad input to a target that is serving: an error that names node or export, nothing left, others go on.

One target runs through the whole module, with a client that writes, reads back and compares all the time.
Each case is a few steps: options that are refused, with what the error must say, and at last what was meant,
under the same name, which must then serve. What a start does with the same mistakes is in test_bad_config.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from target.cli.daemon import Action, act
from target.cli.run import StartError
from target.config.keyval import Argument
from target.config.options import Notation
from target.exports.nbd.server import directory_of
from target.peers.nbd_client import NbdClient
from target.service import Service
from tests.interop.test_bad_config import HEADER_FIELDS, corrupt_header, patch, set_backing
from tests.interop.test_nbd_hostile_more import Target, Worker, target
from tests.interop.test_qcow2_malformed import PAST_END, Mutation, at_place, both, put, refcount_table
from tests.support.nbd import MIB
from tests.support.tools import create_image, qemu_io, sha256

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTLE_SECONDS = 5
PATIENCE = 3  # seconds that the other client may wait for a round


class Step(NamedTuple):
    """An option as on the command line. ``refused``: what its error says; empty when it is to be accepted."""

    option: str
    value: dict[str, Any]
    refused: tuple[str, ...] = ()


Steps = Generator[Step, None, None]
Case = Callable[[Path], Steps]


def node(driver: str, *refused: str, **options: Any) -> Step:
    """The node `bad`; underscores in names stand for dashes."""
    rest = {name.replace("_", "-"): value for name, value in options.items()}
    return Step("blockdev", {"driver": driver, "node-name": "bad"} | rest, refused)


def image(path: Path, *refused: str, **options: Any) -> Step:
    """The node `bad` on a qcow2 image."""
    return node("qcow2", *refused, file={"driver": "file", "filename": str(path)}, **options)


def export(*refused: str, type: str = "nbd", **options: Any) -> Step:
    """The export `bad` of the node `bad`."""
    rest = {name.replace("_", "-"): value for name, value in options.items()}
    value = {"type": type, "id": "bad", "node-name": "bad", "writable": True} | rest
    return Step("export", value, refused)


def vhost(path: Path, *refused: str, **options: Any) -> Step:
    addr = {"type": "unix", "path": str(path)}
    return export(*refused, type="vhost-user-blk", addr=addr, **options)


def server(*refused: str, **addr: Any) -> Step:
    return Step("nbd-server", {"addr": addr}, refused)


NULL = node("null-co", size=MIB, read_zeroes=True)


class Live:
    """The target, the client that goes on, and what the steps of a case have made."""

    def __init__(self, made: Target, worker: Worker) -> None:
        self.service: Service = made.service
        self.address = made.address
        self.worker = worker
        self.accepted: list[Step] = []

    async def act(self, step: Step) -> None:
        await act(self.service, Action(step.option, Argument(step.value, Notation.JSON, False)))

    async def accept(self, step: Step) -> None:
        await self.act(step)
        self.accepted.append(step)

    def state(self, directory: Path | None = None) -> dict[str, object]:
        """All that something refused might leave behind, files in the directory among it."""
        service = self.service
        fds = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return {
            "descriptors": sorted(os.readlink(fd) for fd in fds if os.path.lexists(fd)),
            "nodes": sorted(service.graph.nodes),
            "users": {name: len(node.parents) for name, node in service.graph.nodes.items()},
            "exports": sorted(service.exports),
            "names": sorted(directory_of(service.datapath).exports),
            "servers": len(service.nbd_servers),
            "tasks": len(asyncio.all_tasks()),
            "files": {path.name: _content(path) for path in directory.iterdir()} if directory else {},
        }

    async def is_again(self, before: dict[str, object], directory: Path | None = None) -> None:
        """Asserts that everything is as it was; sessions of clients that have left end soon, not at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while self.state(directory) != before:
                    await asyncio.sleep(0.01)
        assert self.state(directory) == before

    async def refuses(self, step: Step, directory: Path) -> None:
        await self.worker.goes_on()
        before = self.state(directory)
        self.worker.slowest = 0.0
        with pytest.raises(StartError) as caught:
            await self.act(step)
        text = str(caught.value)
        assert text.startswith(f"option --{step.option}: ") and "\n" not in text, text
        for word in step.refused:
            assert word in text, f"{word!r} is not in: {text}"
        await self.worker.goes_on()
        assert self.worker.slowest < PATIENCE
        await self.is_again(before, directory)

    async def run(self, case: Case, directory: Path) -> None:
        """All steps of a case; then what was accepted serves, and is taken away again."""
        before = self.state()
        steps = []
        with contextlib.closing(case(directory)) as source:
            for step in source:
                steps.append(step)
                await (self.refuses(step, directory) if step.refused else self.accept(step))
            assert any(step.refused for step in steps) and not steps[-1].refused
            await self.serves()
            await self.undo()
        await self.worker.goes_on()
        await self.is_again(before)

    async def serves(self) -> None:
        """Asserts that the node `bad` can be written and read by a client."""
        if "bad" not in self.service.graph.nodes:
            await self.accept(NULL)
        if "bad" not in self.service.exports:
            await self.accept(export())
        if "bad" in directory_of(self.service.datapath).exports:
            client = await NbdClient.connect(self.address, "bad")
            await client.write(4096, b"mended!!" * 512)
            kept = self.service.graph.get("bad").driver != "null-co"
            assert await client.read(4096, 4096) == (b"mended!!" * 512 if kept else bytes(4096))
            await client.close()

    async def undo(self) -> None:
        while self.accepted:
            step = self.accepted.pop()
            if step.option == "blockdev":
                await self.service.graph.remove(step.value["node-name"])
            elif step.option == "export":
                await self.service.remove_export(step.value["id"])
            else:
                await self.service.nbd_servers.pop().stop()


def _content(path: Path) -> str:
    return sha256(path) if path.is_file() else "not a file"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def living() -> AsyncIterator[Live]:
    with TemporaryDirectory(prefix="bt-") as name:
        async with target(Path(name), "qcow2", 64 * MIB) as made:
            worker = Worker(await NbdClient.connect(made.address, "other"), 0)
            await worker.goes_on()
            yield Live(made, worker)
            await worker.goes_on()
            assert await worker.end() is None


@pytest_asyncio.fixture(loop_scope="module")
async def live(living: Live) -> AsyncIterator[Live]:
    yield living
    await living.undo()  # what a test that failed has left


# ---- headers ----


def header_field(name: str) -> Case:
    def case(directory: Path) -> Steps:
        path = create_image(directory / "bad.qcow2", "64M")
        corrupt_header(path, name)
        yield image(path, "node 'bad'")
        yield image(create_image(path, "64M"))

    return case


def truncated(length: int) -> Case:
    def case(directory: Path) -> Steps:
        path = create_image(directory / "bad.qcow2", "64M")
        os.truncate(path, length)
        yield image(path, "node 'bad'")
        yield image(create_image(path, "64M"))

    return case


# ---- tables that are refused when the image is opened for writing ----


def small_image(path: Path) -> Path:
    """Clusters of 4 KiB: each L2 table has 2 MiB. Data in the first and the third of them."""
    create_image(path, "8M", options="cluster_size=4k")
    qemu_io(path, "write -P 1 0 64k", "write -P 2 2M 64k", "write -P 3 5M 100k", format="qcow2")
    return path


def damage(path: Path, mutation: Mutation) -> None:
    content = bytearray(path.read_bytes())
    mutation(content)
    path.write_bytes(content)


def table(mutation: Mutation, *words: str) -> Case:
    def case(directory: Path) -> Steps:
        path = small_image(directory / "bad.qcow2")
        damage(path, mutation)
        yield image(path, "node 'bad'", *words)
        yield image(small_image(path))

    return case


def copied(to: Callable[[bytearray], int], place: Callable[[bytearray], int], length: int = 8) -> Mutation:
    """Bytes of the image over others."""

    def apply(content: bytearray) -> None:
        begin, source = to(content), place(content)
        content[begin : begin + length] = content[source : source + length]

    return apply


def field(offset: int, form: str, value: int, *words: str) -> Case:
    def case(directory: Path) -> Steps:
        path = small_image(directory / "bad.qcow2")
        patch(path, offset, form, value)
        yield image(path, "node 'bad'", *words)
        yield image(small_image(path))

    return case


# ---- backing files ----


def backing_loop(directory: Path) -> Steps:
    for name in ("bad", "b", "c"):
        create_image(directory / f"{name}.qcow2", "1M")
    for name, backing in (("bad", "b"), ("b", "c"), ("c", "b")):
        set_backing(directory / f"{name}.qcow2", f"{backing}.qcow2")
    yield image(directory / "bad.qcow2", "node 'bad'", "loop")
    create_image(directory / "c.qcow2", "1M")
    yield image(directory / "bad.qcow2")


def backing_itself(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    set_backing(path, path.name)
    yield image(path, "node 'bad'", "loop")
    yield image(path, backing=None)


def backing_missing(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    set_backing(path, "absent.qcow2")
    yield image(path, "node 'bad'", "absent.qcow2", "No such file")
    create_image(directory / "absent.qcow2", "1M")
    yield image(path)


def backing_of_another_format(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    (directory / "base").write_bytes(bytes(MIB))
    set_backing(path, "base")
    yield image(path, "node 'bad'", "backing", "qcow2")
    create_image(directory / "base", "1M")
    yield image(path)


def backing_truncated(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    os.truncate(create_image(directory / "base", "1M"), 90)
    set_backing(path, "base")
    yield image(path, "node 'bad'", "backing")
    create_image(directory / "base", "1M")
    yield image(path)


# ---- files and locks ----


def missing_file(directory: Path) -> Steps:
    path = directory / "bad.qcow2"
    yield image(path, "node 'bad'", "bad.qcow2", "No such file")
    yield image(create_image(path, "1M"))


def file_that_is_a_directory(directory: Path) -> Steps:
    path = directory / "bad.qcow2"
    path.mkdir()
    yield image(path, "node 'bad'", "directory")
    path.rmdir()
    yield image(create_image(path, "1M"))


def raw_past_its_file(directory: Path) -> Steps:
    path = create_image(directory / "bad.raw", "1M", format="raw")
    file = {"driver": "file", "filename": str(path)}
    yield node("raw", "node 'bad'", "Offset", file=file, offset=4 * MIB)
    yield node("raw", file=file, offset=MIB // 2)


def locked_by_another_process(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write("length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        yield image(path, "node 'bad'", "lock", "bad.qcow2")
        holder.communicate("quit\n")
    yield image(path)


def locked_by_another_node(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    yield Step("blockdev", image(path).value | {"node-name": "first"})
    yield Step("export", export().value | {"id": "first", "node-name": "first"})
    yield Step("blockdev", image(path).value, ("node 'bad'", "lock", "bad.qcow2"))
    yield image(create_image(directory / "its-own.qcow2", "1M"))


# ---- options ----


def options(wrong: Step, right: Step = NULL) -> Case:
    def case(directory: Path) -> Steps:
        yield wrong
        yield right

    return case


def export_options(wrong: Step) -> Case:
    def case(directory: Path) -> Steps:
        yield NULL
        yield wrong
        yield export()

    return case


def unknown_option_of_the_file(directory: Path) -> Steps:
    path = create_image(directory / "bad.qcow2", "1M")
    file = {"driver": "file", "filename": str(path), "filenam": "x"}
    yield node("qcow2", "node 'bad'", "file.filenam", file=file)
    yield image(path)


# ---- names ----


def node_name_twice(directory: Path) -> Steps:
    yield NULL
    yield Step("blockdev", NULL.value, ("node-name='bad'", "Duplicate"))
    yield export()


def node_name_of_the_other(directory: Path) -> Steps:
    yield Step("blockdev", NULL.value | {"node-name": "other"}, ("node-name='other'", "Duplicate"))
    yield NULL


def node_in_itself(directory: Path) -> Steps:
    yield node("raw", "node 'bad'", "Cannot find", file="bad")
    yield NULL


def export_id_twice(directory: Path) -> Steps:
    yield NULL
    yield export()
    yield export("export 'bad'", "in use", name="second")
    yield Step("export", export().value | {"id": "second", "name": "second"})


def export_name_twice(directory: Path) -> Steps:
    yield NULL
    yield export("export 'bad'", "'other'", name="other")
    yield export()


def export_id_of_the_other(directory: Path) -> Steps:
    yield NULL
    yield Step("export", export().value | {"id": "other"}, ("export 'other'", "in use"))
    yield export()


def export_of_a_missing_node(directory: Path) -> Steps:
    yield export("export 'bad'", "node-name='bad'")
    yield NULL
    yield export()


def writable_export_of_a_read_only_node(directory: Path) -> Steps:
    yield Step("blockdev", NULL.value | {"node-name": "fixed", "read-only": True})
    yield export("export 'bad'", "read-only", node_name="fixed")
    yield NULL
    yield export()


# ---- ports and sockets ----


def port_in_use(directory: Path) -> Steps:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        yield server(f"127.0.0.1:{port}", "in use", type="inet", host="127.0.0.1", port=port)
    yield server(type="inet", host="127.0.0.1", port=port)


def port_of_this_target(directory: Path) -> Steps:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
    yield server(type="inet", host="127.0.0.1", port=port)
    yield server(f"127.0.0.1:{port}", "in use", type="inet", host="127.0.0.1", port=port)
    yield server(type="inet", host="127.0.0.1", port="0")


def unix_socket_in_use(directory: Path) -> Steps:
    path = directory / "sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        yield server(str(path), "in use", type="unix", path=str(path))
    yield server(type="unix", path=str(path))


def vhost_socket_in_use(directory: Path) -> Steps:
    path = directory / "sock"
    yield NULL
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        yield vhost(path, "export 'bad'", str(path), "in use")
    yield vhost(path)


def socket_path_that_is_a_file(directory: Path) -> Steps:
    path = directory / "precious"
    path.write_text("data")
    yield NULL
    yield vhost(path, "export 'bad'", str(path))
    yield server(str(path), type="unix", path=str(path))
    assert path.read_text() == "data"
    yield vhost(directory / "sock")


def socket_in_no_directory(directory: Path) -> Steps:
    path = directory / "absent" / "sock"
    yield NULL
    yield vhost(path, "export 'bad'", str(path), "No such file")
    path.parent.mkdir()
    yield vhost(path)


NAMED = "node 'bad'"
EXPORT = "export 'bad'"
CASES: dict[str, Case] = {
    **{f"header-{name}": header_field(name) for name in HEADER_FIELDS},
    **{f"truncated-{length}": truncated(length) for length in (0, 3, 8, 71, 90, 103)},
    "l1-table-past-end": field(40, ">Q", PAST_END, "L1"),
    "refcount-table-past-end": field(48, ">Q", PAST_END, "refcount table"),
    "refcount-table-on-l1": table(copied(lambda _: 48, lambda _: 40)),
    "snapshot-table-past-end": table(both(put(60, ">I", 1), put(64, ">Q", PAST_END)), "snapshot"),
    "l1-at-refcount-table": table(at_place("l1[0]", "reftable"), "L1 table"),
    "l1-at-itself": table(at_place("l1[0]", "l1"), "L1 table"),
    "l1-twice-at-one-l2": table(at_place("l1[1]", "l2"), "same L2 table"),
    "refcount-block-on-l1": table(copied(refcount_table, lambda _: 40), "refcount block"),
    "refcount-block-past-end": table(at_place("reftable[0]", "past-end"), "refcount"),
    "backing-loop": backing_loop,
    "backing-itself": backing_itself,
    "backing-missing": backing_missing,
    "backing-of-another-format": backing_of_another_format,
    "backing-truncated": backing_truncated,
    "missing-file": missing_file,
    "directory": file_that_is_a_directory,
    "not-a-file": options(node("file", NAMED, "regular file", filename="/dev/null")),
    "raw-past-its-file": raw_past_its_file,
    "locked-by-another-process": locked_by_another_process,
    "locked-by-another-node": locked_by_another_node,
    "unknown-driver": options(node("nothing", NAMED, "driver", "'nothing'")),
    "driver-of-the-wrong-type": options(Step("blockdev", NULL.value | {"driver": 7}, (NAMED, "driver"))),
    "unknown-option": options(node("null-co", NAMED, "colour", colour="red")),
    "unknown-option-of-the-file": unknown_option_of_the_file,
    "missing-option": options(node("file", NAMED, "filename")),
    "size-of-the-wrong-type": options(node("null-co", NAMED, "size", size="lots")),
    "size-negative": options(node("null-co", NAMED, "size", size=-1)),
    "size-too-large": options(node("null-co", NAMED, "size", size=1 << 64)),
    "flag-of-the-wrong-type": options(node("null-co", NAMED, "read-only", read_only="perhaps")),
    "name-of-the-wrong-type": options(node("file", NAMED, "filename", filename=["a"])),
    "zero-byte-in-a-name": options(node("file", NAMED, "null character", filename="a\0b")),
    "unknown-export-type": export_options(export(EXPORT, "tape", type="tape")),
    "unknown-export-option": export_options(export(EXPORT, "colour", colour="red")),
    "export-flag-of-the-wrong-type": export_options(export(EXPORT, "writable", writable="perhaps")),
    "unknown-iothread": export_options(export(EXPORT, "absent", iothread="absent")),
    "export-name-too-long": export_options(export(EXPORT, "name", name="x" * 5000)),
    "export-with-bitmaps": export_options(export(EXPORT, "bitmaps", bitmaps=["b"])),
    "queues-none": export_options(vhost(Path("/none"), EXPORT, "num-queues", num_queues=0)),
    "block-size-odd": export_options(vhost(Path("/none"), EXPORT, "block-size", logical_block_size=777)),
    "socket-name-too-long": export_options(vhost(Path("/" + "x" * 120), EXPORT, "too long")),
    "node-name-twice": node_name_twice,
    "node-name-of-the-other": node_name_of_the_other,
    "node-in-itself": node_in_itself,
    "export-id-twice": export_id_twice,
    "export-name-twice": export_name_twice,
    "export-id-of-the-other": export_id_of_the_other,
    "export-of-a-missing-node": export_of_a_missing_node,
    "writable-export-of-a-read-only-node": writable_export_of_a_read_only_node,
    "port-in-use": port_in_use,
    "port-of-this-target": port_of_this_target,
    "unix-socket-in-use": unix_socket_in_use,
    "vhost-socket-in-use": vhost_socket_in_use,
    "socket-path-that-is-a-file": socket_path_that_is_a_file,
    "socket-in-no-directory": socket_in_no_directory,
}


@pytest.mark.parametrize("name", CASES)
async def test_bad_input(live: Live, scratch: Path, name: str) -> None:
    await live.run(CASES[name], scratch)


# Damage that is met by requests only: where it is, and where it is not.
MET: dict[str, tuple[Mutation, int, int]] = {
    "l1-past-end": (at_place("l1[0]", "past-end"), 0, 5 * MIB),
    "l1-unaligned": (at_place("l1[0]", "unaligned"), 0, 5 * MIB),
    "l1-reserved-bits": (at_place("l1[0]", "reserved"), 0, 5 * MIB),
    "l2-past-end": (at_place("l2[0]", "past-end"), 0, 4096),
    "l2-at-its-table": (at_place("l2[0]", "l2"), 0, 4096),
    "l2-at-l1": (at_place("l2[0]", "l1"), 0, 4096),
    "l2-at-refcount-table": (at_place("l2[0]", "reftable"), 0, 4096),
    "l2-compressed-past-end": (at_place("l2[0]", "compressed-past-end"), 0, 4096),
}
PATTERN = {0: b"\1", 4096: b"\1", 5 * MIB: b"\3"}


@contextlib.asynccontextmanager
async def exported(live: Live, path: Path) -> AsyncIterator[NbdClient]:
    """A client of the export `bad` of the image; both are gone afterwards, and nothing is left."""
    before = live.state()
    for step in (image(path), export()):
        await live.accept(step)
    client = await NbdClient.connect(live.address, "bad")
    yield client
    await client.close()
    await live.undo()
    await live.worker.goes_on()
    await live.is_again(before)


@pytest.mark.parametrize("name", MET)
async def test_damage_met_while_serving(
    live: Live, scratch: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The request gets EIO and the log the node's name; the rest of the image and the other export go on."""
    mutation, bad, good = MET[name]
    path = small_image(scratch / "bad.qcow2")
    damage(path, mutation)
    async with exported(live, path) as client:
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                await client.read(bad, 4096)
            assert await client.read(good, 4096) == PATTERN[good] * 4096
        await live.worker.goes_on()
    assert NAMED in caplog.text
    async with exported(live, small_image(path)) as client:
        for at in (bad, good):
            assert await client.read(at, 4096) == PATTERN[at] * 4096
