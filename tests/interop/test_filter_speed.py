# SPDX-License-Identifier: Apache-2.0
"""A filter that has nothing to do costs next to nothing: 4k requests over vhost-user-blk with and without it.

Both targets run all the time and are measured in turns, so that what else the machine does hits both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.clients import build
from tests.support.daemon import Daemon, blockdev
from tests.support.tools import run

pytestmark = pytest.mark.timed

MIB = 1 << 20
SIZE = 64 * MIB
AT_LEAST = 0.9
ROUNDS, MOST_ROUNDS = 2, 24
WORK = {"randread": ("--op", "randread", "--qd", "32"), "randwrite": ("--op", "randwrite", "--qd", "32")}

Options = dict[str, Any]


def raw(path: Path) -> Options:
    with path.open("wb") as out:
        for _ in range(SIZE // MIB):
            out.write(b"x" * MIB)
    return {"driver": "file", "filename": str(path)}


def target(start: Callable[..., Daemon], node: Options, socket: Path, *more: str) -> Daemon:
    export = "type=vhost-user-blk,id=v,node-name=disk,num-queues=1,writable=on,iothread=t"
    node = {name.replace("-", "_"): value for name, value in node.items()}
    return start(
        *("--object", "iothread,id=t"),
        *more,
        *blockdev(node_name="disk", **node),
        *("--export", f"{export},addr.type=unix,addr.path={socket}"),
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    build(directory)
    return directory / "vhost_bench"


def rate(client: Path, socket: Path, process: Daemon, work: tuple[str, ...]) -> float:
    words: list[str | Path] = [
        "--socket",
        socket,
        "--pid",
        str(process.process.pid),
        "--bs",
        "4096",
        "--secs",
        "0.2",
    ]
    found: float = json.loads(run(client, *words, *work).stdout)["iops"]
    return found


def filters(scratch: Path, below: Options) -> dict[str, tuple[Options, list[str]]]:
    """Each over ``below``, with what it needs beside it."""
    old = scratch / "old"
    old.touch()
    with old.open("r+b") as out:
        out.truncate(SIZE)
    group = [
        "--object",
        json.dumps({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 10**9}}),
    ]
    cbw = {"driver": "copy-before-write", "file": below, "target": {"driver": "file", "filename": str(old)}}
    return {
        "throttle": ({"driver": "throttle", "throttle-group": "g", "file": below}, group),
        "copy-on-read": ({"driver": "copy-on-read", "file": below}, []),
        "preallocate": ({"driver": "preallocate", "file": below}, []),
        "copy-before-write": (cbw, []),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throttle", "copy-on-read", "preallocate", "copy-before-write"])
def test_an_idle_filter_costs_next_to_nothing(
    scratch: Path, client: Path, start: Callable[..., Daemon], name: str
) -> None:
    node, more = filters(scratch, raw(scratch / "b"))[name]
    plain = target(start, raw(scratch / "a"), scratch / "a.sock")
    filtered = target(start, node, scratch / "b.sock", *more)
    everything = ("--op", "seqwrite", "--qd", "4", "--ios", str(SIZE // 4096))
    rate(client, scratch / "a.sock", plain, everything)
    rate(client, scratch / "b.sock", filtered, everything)  # copies all that is to be copied
    for kind, work in WORK.items():
        best = [0.0, 0.0]
        for number in range(MOST_ROUNDS):
            for i, (process, socket) in enumerate(((plain, "a.sock"), (filtered, "b.sock"))):
                best[i] = max(best[i], rate(client, scratch / socket, process, work))
            if number >= ROUNDS and best[1] >= AT_LEAST * best[0]:
                break
        print(f"{name} {kind}: {best[1] / best[0]:.3f}")
        assert best[1] >= AT_LEAST * best[0], f"{kind}: {best[1]:.0f} of {best[0]:.0f} requests a second"


@pytest.mark.slow
def test_a_snapshot_is_read_without_asking(scratch: Path, client: Path, start: Callable[..., Daemon]) -> None:
    """What reads a snapshot stays in the datapath, wherever the data are."""
    cbw = filters(scratch, raw(scratch / "b"))["copy-before-write"][0]
    cbw = {name.replace("-", "_"): value for name, value in cbw.items()}
    more = blockdev(node_name="cbw", **cbw)
    snapshot = target(start, {"driver": "snapshot-access", "file": "cbw"}, scratch / "b.sock", *more)
    plain = target(start, raw(scratch / "a"), scratch / "a.sock")
    best = [0.0, 0.0]
    for number in range(MOST_ROUNDS):
        for i, (process, socket) in enumerate(((plain, "a.sock"), (snapshot, "b.sock"))):
            best[i] = max(best[i], rate(client, scratch / socket, process, WORK["randread"]))
        if number >= ROUNDS and best[1] >= AT_LEAST * best[0]:
            break
    assert best[1] >= AT_LEAST * best[0], f"{best[1]:.0f} of {best[0]:.0f} requests a second"
