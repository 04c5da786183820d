# SPDX-License-Identifier: Apache-2.0
"""Our query-qmp-schema beside qemu-storage-daemon's: what it takes is taken here, or is on a list."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.qmp import Json, Qmp, monitor_argv, qmp_daemon

DEPTH = 5
# Members of arguments that the peer takes and we do not, or differently. Each is refused by its name.
DIFFERENCES = {
    "*/+inet/*mptcp:boolean": "there is no such protocol here",
    "*/+inet/*to:int": "a range of ports, of no use to clients and to sockets with one address",
    "*/x-check-cache-dropped:boolean": "for tests of the peer itself",
    "object-add/+secret/*": "secrets are not encrypted with others",
    "object-add/+iothread/thread-pool-m*": "there are no such pools",
    "*/+qcow2/encrypt*": "later",
    "*/+qcow2/data-file*": "later",
    "*/+qcow2/overlap-check*": "words only",
    "*/+copy-before-write/bitmap*": "later",
    "block-export-add/+nbd/bitmaps*": "later",
}
# Commands that come with jobs, bitmaps and internal snapshots.
LATER = (
    *("*job*", "*dirty-bitmap*", "*-internal-sync", "*-backup", "*-mirror", "block-commit", "block-stream"),
    *("blockdev-create", "x-blockdev-amend"),
)

BRANCH = re.compile(r".*/\+[^/:]*")


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
        """A branch is a part of the path, with a plus; what all branches have is in each, too."""
        branches = {"": []} | {
            f"/+{v['case']}": self.infos[v["type"]]["members"] for v in info.get("variants", [])
        }
        for branch, members in branches.items():
            yield path + branch
            for member in (*info["members"], *members):
                yield from self._lines(f"{path}{branch}/{member['name']}", member["type"], depth)

    def required(self, command: str) -> set[str]:
        info = self.infos[self.infos[command]["arg-type"]]
        return {member["name"] for member in info["members"] if "default" not in member}


def test_what_the_peer_takes_is_taken(tmp_path: Path) -> None:
    theirs, ours = schemas(tmp_path)
    missing = {name for name in theirs.commands - ours.commands if not matches(name, LATER)}
    assert not missing, missing
    different = []
    unused = set(DIFFERENCES)
    for command in sorted(theirs.commands & ours.commands):
        lines = ours.lines(command)
        for line in sorted(theirs.lines(command) - lines):
            if "=" in line or BRANCH.fullmatch(line) or not all(branch in lines for branch in branches(line)):
                continue  # a driver, type or backend that is not here
            unused -= {pattern for pattern in DIFFERENCES if fnmatch.fnmatchcase(line, pattern)}
            if not matches(line, DIFFERENCES):
                different.append(line)
    assert not different, "\n".join(different)
    assert not unused
    for command in theirs.commands & ours.commands:
        assert ours.required(command) <= theirs.required(command), command
    assert len(theirs.commands & ours.commands) > 30


def branches(line: str) -> list[str]:
    """The branches of unions that a line is inside of."""
    return [line[: match.end()] for match in re.finditer(r"/\+[^/:]*(?=[/:])", line)]


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
