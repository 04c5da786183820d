# SPDX-License-Identifier: Apache-2.0
"""The same scripts under real nbdkit and as nodes of this target: bytes, flags, block status, errno.

A client of nbdkit is compared with a client of this target's NBD export over the node, so between the script
and the second client stands the graph as well. Where that may be seen, DIFFERENCES says so and why.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.exports.nbd.protocol import CommandFlag, TransmissionFlag
from target.peers.nbd_client import NbdClient
from target.peers.nbd_raw import OptionFailed, RawClient
from tests.support.nbdkit_compare import Case, Seen, both, here, look, status, under_nbdkit
from tests.support.nbdkit_server import Nbdkit

CALLBACKS = ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents")
ABILITIES = (
    *("can_write", "can_flush", "can_trim", "can_zero", "can_fast_zero", "can_extents"),
    *("can_multi_conn", "is_rotational"),
)
LEVELS = ("can_fua", "can_cache")


def cases() -> Iterator[Case]:
    yield Case("minimal")
    yield Case("full")
    yield Case("full", read_only=True)
    yield Case("v1")
    for name in (*CALLBACKS, "pwrite,zero", "flush,trim", "zero,trim", "open", "close", "get_size"):
        yield Case("missing", (f"callback={name}",))
        if "," not in name:
            yield Case("not_callable", (f"callback={name}",))
    for name in (*CALLBACKS, *ABILITIES, *LEVELS, "open", "close", "get_size", "block_size", "preconnect"):
        yield Case("raising", (f"callback={name}",))
    for name in (*CALLBACKS, "open"):
        for number in (28, 95, 1, 30, 22, 75, 108, 110, 27, 122, 12):
            if name in ("pwrite", "zero") or number in (28, 95):
                yield Case("raising", (f"callback={name}", f"errno={number}"))
    for name in ABILITIES:
        more = ("0", "'x'", "2.5", "[]") if name in ("can_write", "can_fast_zero") else ()
        for value in ("True", "False", "1", "None", *more):
            yield Case("returning", (f"callback={name}", f"value={value}"))
    for name in LEVELS:
        for value in ("0", "1", "2", "3", "-1", "True", "None", "'x'", "1.0", "1 << 40"):
            yield Case("returning", (f"callback={name}", f"value={value}"))
    for name in CALLBACKS:
        for value in ("5", "'text'"):
            yield Case("returning", (f"callback={name}", f"value={value}"))
    for value in ("None", "0", "object", "'handle'"):
        yield Case("returning", ("callback=open", f"value={value}"))
    for value in (
        "n * b'x'",
        "n * b'x' + b'more'",
        "n * b'x' + b'm' if n > 512 else b'short'",
        "bytearray(n)",
    ):
        yield Case("v1_reads", (f"value={value}",))
    for value in ("n * 'x'", "None", "5", "[0] * n", "memoryview(n * b'm')", "array.array('I', [7] * n)"):
        yield Case("v1_reads", (f"value={value}",))
    for value in ("memoryview(n * b'ab')[::2]", "memoryview(bytes(4 * n)).cast('I')"):
        yield Case("v1_reads", (f"value={value}",))
    for value in ("2", "3", "0", "-1", "'2'", "2.0", "True", "None", "1 << 70", "[2]"):
        yield Case("api_version", environment=(("PLUGIN_API_VERSION", value),))
    for value in ("0", "1", "2", "3", "4", "-1", "'x'", "None", "True", "2.0", "1 / 0"):
        yield Case("models", (f"model={value}",))
    for number in (95, 45, 5, 28):
        for raises in ("yes", "no"):
            yield Case("zero_fallback", (f"errno={number}", f"raises={raises}", "journal=JOURNAL"))
    for level in (0, 1, 2):
        for flush in ("yes", "no"):
            yield Case("fua", (f"level={level}", f"flush={flush}"))
    yield from extents_cases()
    yield from other_cases()


def extents_cases() -> Iterator[Case]:
    for value in (
        "[(offset, count, 0)]",
        "[(offset, count, 3)]",
        "[(offset, count, 2)]",
        "[(offset, count, 1)]",
        "[(offset, count, 7)]",
        "[(offset, 512, 0), (offset + 512, count, 3)]",
        "((offset + i * 512, 512, i % 4) for i in range(200))",
        "[(0, 1 << 62, 3)]",
        "[(0, 100, 3), (100, 65436, 0)]",
        "[]",
        "()",
        "None",
        "5",
        "'text'",
        "{}",
        "[None]",
        "[(offset, count)]",
        "[(offset, count, 0, 0)]",
        "[[offset, count, 0]]",
        "[(offset, count, '0')]",
        "[(offset, count, None)]",
        "[(offset, float(count), 0)]",
        "[(offset + 1, count, 0)]",
        "[(offset, 0, 0)]",
        "[(offset, 0, 3), (offset, count, 0)]",
        "[(offset, -1, 0)]",
        "[(-1, count, 0)]",
        "[(offset, count, -1)]",
        "[(offset, 1 << 64, 0)]",
        "[(offset, 512, 3)]",
        "[(offset, 512, 3), (offset + 600, count, 0)]",
        "[(offset, 512, 3), (offset + 100, count, 0)]",
        "[(offset + 512, 512, 3), (offset, 512, 0)]",
        "[(offset + count, 512, 3)]",
        "[(0, 1, 3)]",
        "[(True, 65536, True)]",
        "broken(offset)",
        "{(offset, count, 3): 1}",
        "__import__('collections').namedtuple('E', 'a b c')(offset, count, 3)",
        "[__import__('collections').namedtuple('E', 'a b c')(offset, count, 3)]",
    ):
        yield Case("extents_shape", (f"value={value}",))


def other_cases() -> Iterator[Case]:
    yield Case("exports")
    yield Case("exports", export="given")
    yield Case("exports", export="naïve name/with a path")
    for value in ("'default'", "''", "None", "5", "1 / 0", "b'bytes'", "'with\\0nul'"):
        yield Case("exports", (f"default={value}",))
        yield Case("exports", (f"default={value}",), export="given")
    yield Case("state")
    yield Case("buffers")
    yield Case("late")
    yield Case("background")
    yield Case("output")
    yield Case("config_rules", ("b=1", "a=2", "c=", "d= = ", "e=naïve"))
    for words in (("a=raise",), ("a=exit",), ("complete=no",), ("ready=no",), ("fork=no",), ("connect=no",)):
        yield Case("config_rules", words)
    yield Case("minimal", ("key=value",))
    sizes = ("0", "1", "511", "512", "4097", "65535", "True", "-1", "(1 << 63) - 1", "1 << 63", "'4096'")
    for size in (*sizes, "4096.0", "None", "Index()", "[4096]"):
        yield Case("sizes", (f"size={size}",))
    for value in (
        *("(1, 4096, 65536)", "(512, 4096, 65536)", "(4096, 4096, 0xffffffff)", "(0, 0, 0)", "(65536,) * 3"),
        *("(0, 4096, 65536)", "(3, 4096, 65536)", "(1, 5000, 65536)", "(512, 256, 65536)", "(1, 4096, 1000)"),
        *("(131072, 131072, 131072)", "(1, 1 << 26, 1 << 27)", "(512, 4096, 65537)", "(1, 4096)"),
        *("[1, 4096, 65536]", "None", "(1, 4096, '65536')", "(1.0, 4096, 65536)", "(-1, 4096, 65536)"),
        *("(1, 4096, -1)", "(1, 4096, 1 << 40)", "(1, 4096, 1 << 70)", "(512, 512, 512)"),
    ):
        yield Case("blocks", (f"sizes={value}",))
    for how in (
        *("base", "interrupt", "exit", "stop", "unprintable", "surrogate", "oserror", "recursion", "memory"),
        *("assert", "long", "set only", "set twice", "set zero", "set minus", "set 9999", "other thread"),
    ):
        yield Case("exceptions", (f"how={how}",))
    for kind in (
        *("fewer", "more", "defaults", "any", "keywords", "object", "method", "class", "partial", "cached"),
        *("asynchronous", "generator", "builtin"),
    ):
        yield Case("signatures", (f"kind={kind}",))
    for trouble in (
        "pass",
        "1 / 0",
        "sys.exit(4)",
        "raise KeyboardInterrupt",
        "x = = 1",
        "del open",
        "pread = 5",
    ):
        yield Case("top_level", environment=(("PLUGIN_TROUBLE", trouble),))


# What differs, and why it may: script and parameters begin with the first text, the step with the second.
DIFFERENCES: list[tuple[str, str, str]] = [
    (
        "blocks sizes=(65536,) * 3",
        "",
        "nbdkit leaves its block size to the client, which is told; the graph keeps to it, so of a trim that "
        "is smaller than a block nothing reaches the plugin, whose trim can be seen",
    ),
]
# Where nbdkit 1.32.5 itself crashes; here the request fails.
NBDKIT_DIES = {
    "raising callback=flush errno=95",
    "exceptions how=surrogate",
    "exceptions how=set minus",
}


def explained(case: Case, step: str) -> bool:
    return any(str(case).startswith(of) and step.startswith(at) for of, at, _ in DIFFERENCES)


@pytest.mark.parametrize("case", list(cases()), ids=str)
async def test_same(case: Case, scratch: Path) -> None:
    ours, theirs = await both(case, scratch, look)
    assert theirs.died == (str(case) in NBDKIT_DIES)
    if theirs.died:
        assert not ours.refused  # and every request got its answer
        return
    found = differences(case, ours, theirs)
    assert not found, found


def outcome(seen: Seen) -> dict[str, Any]:
    return {"refused": bool(seen.refused), **({} if seen.refused else seen.steps)}


def differences(case: Case, ours: Seen, theirs: Seen) -> dict[str, tuple[Any, Any]]:
    """What this target's client saw, and nbdkit's."""
    mine, other = outcome(ours), outcome(theirs)
    found = {
        step: (mine.get(step), other.get(step))
        for step in {**mine, **other}
        if mine.get(step) != other.get(step) and not explained(case, step)
    }
    return {**found, "said": (ours.refused, theirs.refused)} if "refused" in found else found


# ---- what the plugin sees ----

JOURNAL = "journal=JOURNAL"
CHANGES = ("pwrite", "zero", "trim", "flush", "cache")
JOURNALS = [
    Case("full", (JOURNAL,)),
    Case("full", (JOURNAL,), read_only=True),
    Case("v1", (JOURNAL,)),
    *(
        Case("missing", (JOURNAL, f"callback={name}"))
        for name in ("flush", "zero", "trim", "pwrite", "cache")
    ),
    *(
        Case("fua", (JOURNAL, f"level={level}", f"flush={word}"))
        for level in (0, 1, 2)
        for word in ("yes", "no")
    ),
    *(
        Case("zero_fallback", (JOURNAL, f"errno={n}", f"raises={word}"))
        for n in (5, 95)
        for word in ("yes", "no")
    ),
    Case("returning", (JOURNAL, "callback=can_cache", "value=1")),
    Case("returning", (JOURNAL, "callback=can_zero", "value=False")),
    Case("returning", (JOURNAL, "callback=can_fast_zero", "value=True")),
]


@pytest.mark.parametrize("case", JOURNALS, ids=str)
async def test_plugin_sees_the_same_requests(case: Case, scratch: Path) -> None:
    """In the same order, with the same flags."""
    ours, theirs = await both(case, scratch, look)
    assert [line for line in ours.journal if line[0] in CHANGES] == [
        line for line in theirs.journal if line[0] in CHANGES
    ]
    reads = [{tuple(line) for line in seen.journal if line[0] == "pread"} for seen in (ours, theirs)]
    assert reads[0] == reads[1]
    assert theirs.journal


async def test_same_life(scratch: Path) -> None:
    """Callbacks outside of requests, from config to cleanup."""

    async def one_read(client: NbdClient, seen: Seen) -> None:
        await seen.note("read", client.read(0, 512))

    case = Case("lifecycle", (JOURNAL, "other=value"))
    ours, theirs = await both(case, scratch, one_read)
    assert ours.steps == theirs.steps
    assert ours.journal == theirs.journal
    assert [line[0] for line in ours.journal][-2:] == ["close", "cleanup"]


async def test_same_module_and_surroundings(scratch: Path) -> None:
    found = []

    async def take(client: NbdClient, seen: Seen) -> None:
        found.append(json.loads((await client.read(0, 65536)).rstrip(b"\0")))

    async with asyncio.timeout(60):
        case = Case("module_facts")
        await under_nbdkit(case, scratch, take)
        await here(case, scratch, take)
    theirs, ours = found
    # nbdkit runs callbacks in threads of its own; here it is the main thread unless the model is PARALLEL.
    assert (theirs.pop("main thread"), ours.pop("main thread")) == (False, True)
    assert ours == theirs


@pytest.mark.parametrize("model", [0, 1, 2, 3])
async def test_same_parallelism(scratch: Path, model: int) -> None:
    """How many callbacks ran at a time at most, of four that take a while."""
    most: list[int] = []

    async def at_once(client: NbdClient, seen: Seen) -> None:
        await asyncio.gather(*(client.read(512 * n, 512) for n in range(1, 5)))
        most.append((await client.read(0, 1))[0])

    await both(Case("models", (f"model={model}",)), scratch, at_once)
    assert len(most) == 2 and all(number > 1 if model == 3 else number == 1 for number in most), most


async def test_same_with_large_requests(scratch: Path) -> None:
    mib = 1 << 20

    async def large(client: NbdClient, seen: Seen) -> None:
        everything = bytes(range(251)) * (3 * mib)
        for offset, length in ((1, 32 * mib), (5 * mib - 1, mib + 1)):
            await seen.note(f"read {offset}+{length}", client.read(offset, length))
        await seen.note("write", client.write(7, everything[: 32 * mib]))
        await seen.note("read after write", client.read(31 * mib, 2 * mib))
        await seen.note("zero", client.write_zeroes(3 * mib + 1, 80 * mib))
        for offset in (0, 80 * mib):
            await seen.note(f"read {offset} after zero", client.read(offset, 8 * mib))
        await seen.note("map", client.map())
        await seen.note("part", status(client, 50 * mib + 1, 40 * mib))
        reads = [client.read(n * 2 * mib, 2 * mib) for n in range(16)]
        await seen.note("at once", joined(reads))

    async def joined(reads: list[Coroutine[Any, Any, bytes]]) -> bytes:
        return b"".join(await asyncio.gather(*reads))

    ours, theirs = await both(Case("large"), scratch, large)
    assert differences(Case("large"), ours, theirs) == {}


@pytest.mark.parametrize("script", ["full", "v1", "large"])
async def test_same_in_random_use(scratch: Path, script: str) -> None:
    """What comes back, and what the plugin was asked, request by request."""

    async def use(client: NbdClient, seen: Seen) -> None:
        chance, size, flags = random.Random(script), client.export.size, client.export.flags
        fua = [0] + [int(CommandFlag.FUA)] * bool(flags & TransmissionFlag.SEND_FUA)
        for n in range(300):
            offset = chance.randrange(size)
            length = min(chance.choice((1, 3, 512, 4096, 5000, 30000)), size - offset)
            match chance.randrange(6):
                case 0 | 1:
                    await seen.note(f"{n} read", client.read(offset, length))
                case 2:
                    data = chance.randbytes(length)
                    await seen.note(f"{n} write", client.write(offset, data, chance.choice(fua)))
                case 3:
                    keep = chance.choice((0, int(CommandFlag.NO_HOLE)))
                    work = client.write_zeroes(offset, length, keep | chance.choice(fua))
                    await seen.note(f"{n} zero", work)
                case 4 if flags & TransmissionFlag.SEND_TRIM:
                    await seen.note(f"{n} trim", client.trim(offset, length, chance.choice(fua)))
                case 5:
                    await seen.note(f"{n} status", status(client, offset, length))
        await seen.note("all", client.read(0, min(size, 8 << 20)))

    case = Case(script, (JOURNAL,) * (script != "large"))
    ours, theirs = await both(case, scratch, use)
    assert differences(case, ours, theirs) == {}
    changes = [[line for line in seen.journal if line[0] in CHANGES] for seen in (ours, theirs)]
    assert changes[0] == changes[1]


@pytest.mark.parametrize(
    "value",
    [
        "[('a', 'first'), ('b', 'second')]",
        "['a', 'b', ('c', 'third')]",
        "(name for name in ('x', 'y'))",
        "[]",
        "'text'",
        "None",
        "5",
        "[1]",
        "[('a',)]",
        "[('a', 'b', 'c')]",
        "[('a', 5)]",
        "[b'bytes']",
        "[['a', 'b']]",
        "1 / 0",
        "(1 / 0 for n in (1, 2))",
        "(name if name != 'y' else 1 / 0 for name in 'xyz')",
    ],
)
async def test_same_list_of_exports(scratch: Path, value: str) -> None:
    """nbdkit tells its clients; here it stands in the error for a name that the plugin refuses."""
    case = Case("exports", (f"list={value}",), export="refused")
    server = Nbdkit(scratch, case.path, *case.parameters)
    try:
        raw = await RawClient.connect(str(server.sock))
        await raw.greet()
        try:
            listed = ", ".join(name for name, _ in await raw.list_exports())
        except (OptionFailed, EOFError, ConnectionError):
            listed = ""
        await raw.close()
    finally:
        server.kill()
    ours = await here(case, scratch, look)
    assert "there is no such export" in ours.refused
    assert ours.refused.endswith(f" (it offers: {listed})" if listed else "no such export"), listed


async def test_shutdown(scratch: Path) -> None:
    """The request that asked for it is done. nbdkit then hangs up; here every later request fails."""

    async def shut_down(client: NbdClient, seen: Seen) -> None:
        await seen.note("write", client.write(0, b"shutdown"))
        await asyncio.sleep(0.3)
        with pytest.raises((OSError, EOFError)):
            await client.read(0, 512)

    ours, theirs = await both(Case("shutdown", (JOURNAL,)), scratch, shut_down)
    assert ours.steps["write"] is theirs.steps["write"] is None
    assert [line[0] for line in ours.journal][-3:] == ["pwrite", "close", "cleanup"]
    assert [line[0] for line in theirs.journal if line[0] != "close"][-2:] == ["pwrite", "cleanup"]
