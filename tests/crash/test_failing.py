# SPDX-License-Identifier: Apache-2.0
"""Under load the n-th read, write, flush, write-zeroes or discard of the image file fails, once or for good.

The client must hear of what is lost, the target lives and serves its other export, nothing that was flushed
is lost, and the image checks and opens again. Each n is a target of its own; some values of n are tried here,
on images of several kinds, and every one of a short life in test_every_failure.py.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.crash import images
from tests.crash.history import SECTOR, History
from tests.crash.history import Kind as Sectors
from tests.crash.images import KINDS, Kind
from tests.crash.load import Load
from tests.crash.reopening import goes_on
from tests.crash.targets import Nursery, Target

OTHER = {"driver": "null-co", "node-name": "other", "size": 1 << 20, "read-zeroes": True}
REQUESTS = 45
MOST = 8  # values of n for each type of request, image and way to fail
OPERATIONS = ("read", "write", "flush", "write-zeroes", "discard")


@dataclass(frozen=True)
class Failure:
    """The rule for blkdebug."""

    operation: str
    after: int
    once: bool
    number: int
    short: int = 0

    def rule(self) -> dict[str, Any]:
        rule = {"event": "none", "iotype": self.operation, "x-after": self.after, "once": self.once}
        return rule | {"errno": self.number} | ({"x-short": self.short} if self.short else {})


@dataclass
class Outcome:
    """How a life went. ``heard``: somebody was told of an error."""

    started: bool
    heard: bool
    counts: dict[str, int]


async def life(
    nursery: Nursery, kind: Kind, disk: Path, failure: Failure | None, history: History
) -> Outcome:
    """A short life of an image on a file that may fail."""
    rules = [failure.rule()] if failure else []
    file = {"driver": "blkdebug", "node-name": "debug", "image": images.file(disk), "inject-error": rules}
    with Target(nursery, images.qcow2(kind, {**file}), OTHER, grants=kind.grants) as target:
        if not await target.ready():
            output = target.output()
            assert failure is not None and target.status == 1, output
            assert output.count("\n") == 1 and "'disk'" in output, output
            return Outcome(False, True, {})
        clients = [await target.connect() for _ in range(2)]
        other = await target.connect("other")
        load = Load(clients, history, "failing", kind.largest)
        for part in range(3):
            await heard_of(load, load.change(clients[0], Sectors.WRITE, 128 * part, 256))
            await heard_of(load, load.flush(clients[1]))
            await heard_of(load, load.change(clients[0], Sectors.ZEROES, 128 * part + 131, 2))
            await load.run(REQUESTS // 3, in_flight=2)
            await heard_of(load, load.change(clients[1], Sectors.DISCARD, 128 * part, 128))
            await heard_of(load, load.flush(clients[0]))
        assert not load.gone, target.output()
        assert await other.read(4096, 4096) == bytes(4096)
        counts = target.counters()["debug"]["operations"]
        await asyncio.gather(*(client.close() for client in (*clients, other)))
        status = await target.stop()
        assert "Traceback" not in target.output(), target.output()
        if failure is not None:
            assert set(load.errors) <= {failure.number}, [errno.errorcode.get(e, e) for e in load.errors]
        if status == 0:
            history.complete_flush(history.begin_flush())  # a clean stop flushes
        return Outcome(True, bool(load.errors) or status != 0, counts)


async def heard_of(load: Load, request: Awaitable[None]) -> None:
    """One request, whose failure counts as those of the load."""
    try:
        await request
    except OSError as error:
        load.errors.append(error.errno or 0)


def spread(count: int, most: int) -> Iterable[int]:
    """At most so many values from 0 on, the first ones and then ever fewer."""
    return sorted({min(count - 1, round(count * (i / most) ** 1.5)) for i in range(most)}) if count else []


WAYS = {
    "once-EIO": (True, errno.EIO, 0),
    "sticky-EIO": (False, errno.EIO, 0),
    "once-ENOSPC": (True, errno.ENOSPC, 0),
    "sticky-short-ENOSPC": (False, errno.ENOSPC, SECTOR),
}
CASES = [
    ("4k-one-slice", "once-EIO"),
    ("4k-one-slice", "sticky-short-ENOSPC"),
    ("64k-chain", "sticky-EIO"),
    ("64k-chain", "once-ENOSPC"),
    ("2k-chain-snapshot", "once-EIO"),
    ("2k-chain-snapshot", "sticky-EIO"),
    ("4k-compressed", "once-ENOSPC"),
    ("4k-compressed", "sticky-short-ENOSPC"),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "way"), CASES)
async def test_nth_operation_fails(nursery: Nursery, scratch: Path, scale: int, name: str, way: str) -> None:
    kind, (once, error_number, short) = KINDS[name], WAYS[way]
    disk = images.make(kind, scratch)
    start, base = disk.read_bytes(), images.content(disk)
    fixed = images.untouchable(kind, disk)
    counts = (await life(nursery, kind, disk, None, History(base))).counts
    heard: dict[str, list[bool]] = {}
    for operation in OPERATIONS:
        for number, after in enumerate(spread(counts[operation], MOST * scale)):
            disk.write_bytes(start)
            failure = Failure(operation, after, once, error_number, short if operation == "write" else 0)
            history = History(base)
            outcome = await life(nursery, kind, disk, failure, history)
            try:
                images.check(disk)
                content = images.content(disk)
                history.check_content(content)
                assert images.untouchable(kind, disk) == fixed
                if number % 3 == 0:
                    await goes_on(disk, kind, content)
            except AssertionError as error:
                raise AssertionError(f"{failure}: {error}") from None
            heard.setdefault(operation, []).append(outcome.heard)
    assert set(heard) == set(OPERATIONS), f"no request of some type came down: {counts}"
    for operation, values in heard.items():
        # What nobody waits for may fail once in silence: it is done again. That has no effect on the content:
        # a life in which all went well for the clients must leave all that they were told is done.
        all_heard = not once and operation in ("write", "flush")
        enough = all(values) if all_heard else any(values) if once else sum(values) >= 0.8 * len(values)
        assert enough or operation == "discard", f"{operation}: {values}"
