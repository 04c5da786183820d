# SPDX-License-Identifier: Apache-2.0
"""The same commands on two programs, qemu-storage-daemon and ours, and their answers made comparable."""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.daemon import blocktarget_argv
from tests.support.qmp import Qmp, monitor_argv

START_SECONDS = 30
STOP_SECONDS = 30
PEER = "qemu-storage-daemon"
OBJECTS = [
    word
    for object in ("iothread,id=io0", "throttle-group,id=tg0", "throttle-group,id=tg1")
    for word in ("--object", object)
]
PR_SET_PDEATHSIG = 1

Json = dict[str, Any]

_libc = ctypes.CDLL(None)


class Answer(NamedTuple):
    """``error`` is the class and the text, or None."""

    value: Any
    error: tuple[str, str] | None


class Program:
    """One of the two, in a directory of its own that is made from another. It ends with this process."""

    def __init__(self, argv: list[str], images: Path) -> None:
        self.name = argv[0]
        self.directory = Path(tempfile.mkdtemp(prefix="bt-pair-"))
        for image in images.iterdir():
            shutil.copyfile(image, self.directory / image.name)
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*argv, *monitor_argv(Path("monitor")), *OBJECTS],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )
        try:
            self.client = self._connect(self.directory / "monitor")
        except BaseException:
            self.kill()
            raise

    def _connect(self, path: Path) -> Qmp:
        """The socket is there a moment before it listens."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return Qmp(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, self.output()
                assert time.monotonic() < end, self.output()
                time.sleep(0.005)

    def run(self, command: str, arguments: Json) -> Answer:
        try:
            answer = self.client.ask({"execute": command, "arguments": arguments})
        except (EOFError, ConnectionError):
            raise AssertionError(f"{self.name} ended in {command} {arguments}: {self.output()}") from None
        except TimeoutError:
            raise AssertionError(
                f"{self.name} does not answer {command} {arguments}: {self.output()}"
            ) from None
        if "error" in answer:
            return Answer(None, (answer["error"]["class"], answer["error"]["desc"]))
        return Answer(answer["return"], None)

    def wait_deleted(self, id: str) -> None:
        """Returns when the export has been reported as gone."""
        event = self.client.wait_event("BLOCK_EXPORT_DELETED")
        assert event["data"]["id"] == id, (self.name, event, id)

    def output(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def stop(self) -> None:
        """Asks it to end, and asserts that it did so cleanly. It is gone in any case."""
        self.client.close()
        self.process.terminate()
        try:
            status: int | str = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"still there after {STOP_SECONDS} s"
        finally:
            output = self.kill()
        assert status == 0 and "Traceback" not in output, f"{self.name}: {status}: {output}"

    def kill(self) -> str:
        """Ends it at once. Returns what it had printed."""
        self.process.kill()
        self.process.wait()
        output = self.output()
        shutil.rmtree(self.directory)
        return output


def _end_with_parent() -> None:
    """In the new process: it is killed when the one that tests is, by whatever."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Pair:
    """Both programs."""

    def __init__(self, images: Path) -> None:
        self.peer = Program([PEER], images)
        try:
            self.ours = Program(blocktarget_argv("daemon"), images)
        except BaseException:
            self.peer.kill()
            raise

    def run(self, command: str, arguments: Json) -> tuple[Answer, Answer]:
        return self.peer.run(command, arguments), self.ours.run(command, arguments)

    def wait_deleted(self, id: str) -> None:
        self.peer.wait_deleted(id)
        self.ours.wait_deleted(id)

    def stop(self) -> None:
        try:
            self.peer.stop()
        finally:
            self.ours.stop()


# Who is at fault is in front of our messages, and we say who uses what.
_SUBJECT = re.compile(r"^(?:(?:node '[^']*'(?: child '[^']*')*|export '[^']*'): )+")
_SPECIFIC = (
    # In blockdev-add the peer names it twice, in blockdev-reopen once.
    (re.compile(r"Cannot find device='[^']*' nor"), "Cannot find"),
    (re.compile(r"Could not open backing file: ((?:Cannot find|Failed to get) .*)"), r"\1"),
    (re.compile(r"((?:Block device|Node) \S+ is in use): by .*"), r"\1"),
    (re.compile(r"(Read-only block node \S+ cannot support read-write users): .*"), r"\1"),
    (re.compile(r"(The overlay is already in use): by .*"), r"\1"),
    (
        re.compile(
            r"(Failed to get (?:shared )?\"[a-z ]+\" lock): Is another process using the image \[.*\]\?"
        ),
        r"\1",
    ),
    (re.compile(r"Device '\(null\)' is in use|(Node '\S+' is busy): .*"), r"busy"),
    # Which of several conflicts is told of, and what an export is called in it.
    (re.compile(r"Permission conflict on node '[^']*': permissions '.*"), "Permission conflict"),
)


def plain(text: str) -> str:
    """A message of either program, without what only ours says."""
    text = re.sub(r" +", " ", _SUBJECT.sub("", text))
    for pattern, rest in _SPECIFIC:
        text = pattern.sub(rest, text)
    return text


def graph_of(program: Program) -> Json:
    """Nodes by name (made up for those without one: of a user, and the role), edges, exports."""
    graph = program.run("x-debug-query-block-graph", {}).value
    nodes = program.run("query-named-block-nodes", {"flat": True}).value
    by_id = {node["id"]: node["name"] for node in graph["nodes"] if node["type"] == "block-driver"}
    backends = {node["id"] for node in graph["nodes"] if node["type"] == "block-backend"}
    names = _Names(by_id, graph["edges"])
    return {
        "nodes": {names.of(node["node-name"]): _node(node, program.directory) for node in nodes},
        "edges": sorted(_edge(edge, names, by_id, backends) for edge in graph["edges"]),
        "exports": {
            export["id"]: [export["type"], names.of(export["node-name"]), export["shutting-down"]]
            for export in program.run("query-block-exports", {}).value
        },
    }


class _Names:
    def __init__(self, by_id: dict[int, str], edges: list[Json]) -> None:
        self._users: dict[str, list[tuple[str, str]]] = {}
        for edge in edges:
            if edge["parent"] in by_id:
                user = by_id[edge["parent"]], edge["name"]
                self._users.setdefault(by_id[edge["child"]], []).append(user)

    def of(self, name: str) -> str:
        if not name.startswith("#"):
            return name
        return min(f"{self.of(user)}/{role}" for user, role in self._users.get(name, [("unused", "")]))


def _node(node: Json, directory: Path) -> Json:
    image = node["image"]
    known = ("drv", "ro", "detect_zeroes", "cache", "encrypted", "write_threshold", "file", "backing_file")
    found = {name: node.get(name) for name in known}
    for name in ("virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "filename"):
        found[name] = image.get(name)
    found["specific"] = image.get("format-specific") if node["drv"] == "qcow2" else None
    for name in ("file", "backing_file", "filename", "backing-filename"):
        value = found[name]
        if isinstance(value, str):  # ours names what is behind a snapshot so that it is found from anywhere
            found[name] = "json:" if value.startswith("json:") else value.removeprefix(f"{directory}/")
    return found


def _edge(edge: Json, names: _Names, by_id: dict[int, str], backends: set[int]) -> list[Any]:
    user = "backend" if edge["parent"] in backends else names.of(by_id[edge["parent"]])
    child = names.of(by_id[edge["child"]])
    return [user, edge["name"], child, sorted(edge["perm"]), sorted(edge["shared-perm"])]
