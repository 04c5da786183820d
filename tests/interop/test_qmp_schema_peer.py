# SPDX-License-Identifier: Apache-2.0
"""Our query-qmp-schema beside qemu-storage-daemon's: what a manager finds there, it finds here, or on a list."""

from __future__ import annotations

import fnmatch
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.qmp import Json, Qmp, monitor_argv, qmp_daemon

DEPTH = 5
# Members of arguments that the peer takes and we do not, or differently. Each is refused by its name.
DIFFERENCES = {
    "*=*": "words of the peer's: drivers, backends, object and export types that are not here",
    "nbd-server-start/addr/data/*": "a socket to listen on is a path, or a host and a port",
    "block-export-add/addr/*": "likewise",
    "*/x-check-cache-dropped": "for tests of the peer itself",
    "object-add/iv": "secrets are not encrypted with others",
    "object-add/keyid": "likewise",
    "object-add/loaded": "obsolete",
    "object-add/thread-pool-m*": "there are no such pools",
    "*/encrypt*": "later",
    "*/data-file*": "later",
    "*/overlap-check:object": "words only",
    "*/overlap-check/*": "words only",
    "block-export-add/bitmaps*": "later",
}
# Commands that come with jobs, bitmaps and internal snapshots.
LATER = ("*job*", "*dirty-bitmap*", "*-internal-sync", "*-backup", "*-mirror", "block-commit", "block-stream")
LATER += ("blockdev-create", "x-blockdev-amend")


class Tree:
    """What may stand in arguments, as lines: ``block_resize/size:int``, ``blockdev-add/driver=file``."""

    def __init__(self, infos: list[Json]) -> None:
        self.infos = {info["name"]: info for info in infos}
        self.commands = {name for name, info in self.infos.items() if info["meta-type"] == "command"}

    def lines(self, command: str) -> set[str]:
        return set(self._lines(command, self.infos[command]["arg-type"], 0))

    def _lines(self, path: str, kind: str, depth: int) -> Iterator[str]:
        info = self.infos[kind]
        match info["meta-type"]:
            case "builtin":
                yield f"{path}:{info['json-type']}"
            case "enum":
                yield f"{path}:string"
                for value in info["values"]:
                    yield f"{path}={value}"
            case "array":
                yield f"{path}:array"
                yield from self._lines(path + "[]", info["element-type"], depth)
            case "alternate":
                for member in info["members"]:
                    yield from self._lines(path, member["type"], DEPTH)
            case "object":
                yield f"{path}:object"
                if depth < DEPTH:
                    yield from self._members(path, info, depth + 1)

    def _members(self, path: str, info: Json, depth: int) -> Iterator[str]:
        variants = [self.infos[variant["type"]] for variant in info.get("variants", [])]
        for each in (info, *variants):
            for member in each["members"]:
                yield from self._lines(f"{path}/{member['name']}", member["type"], depth)

    def required(self, command: str) -> set[str]:
        info = self.infos[self.infos[command]["arg-type"]]
        return {member["name"] for member in info["members"] if "default" not in member}


def test_what_the_peer_takes_is_taken(tmp_path: Path) -> None:
    theirs, ours = schemas(tmp_path)
    missing = {name for name in theirs.commands - ours.commands if not matches(name, LATER)}
    assert not missing, missing
    different = {
        line
        for command in theirs.commands & ours.commands
        for line in theirs.lines(command) - ours.lines(command)
        if not matches(line, DIFFERENCES)
    }
    assert not different, "\n".join(sorted(different))
    for command in theirs.commands & ours.commands:
        assert ours.required(command) <= theirs.required(command), command
    assert len(theirs.commands & ours.commands) > 30


def matches(line: str, patterns: object) -> bool:
    assert isinstance(patterns, tuple | dict)
    return any(fnmatch.fnmatchcase(line, pattern) for pattern in patterns)


def schemas(folder: Path) -> tuple[Tree, Tree]:
    """The peer's and ours."""
    path = folder / "peer"
    peer = subprocess.Popen(["qemu-storage-daemon", *monitor_argv(path)])
    try:
        with qmp_daemon(folder / "ours"):
            end = time.monotonic() + 20
            while not path.exists():
                assert peer.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            with Qmp(path) as one, Qmp(folder / "ours") as two:
                return Tree(one.execute("query-qmp-schema")), Tree(two.execute("query-qmp-schema"))
    finally:
        peer.terminate()
        peer.wait(20)
