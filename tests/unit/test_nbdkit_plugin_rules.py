# SPDX-License-Identifier: Apache-2.0
"""nbdkit's rules for callbacks: defaults, both versions of the interface, errors, block status.

All in this process; tests/interop compares with the nbdkit that is installed.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from target.nbdkit import module, wire
from target.nbdkit.connection import Connection
from target.nbdkit.plugin import Failed, Plugin

BASE = """
import errno, nbdkit, threading
API_VERSION = 2
calls = []
disk = bytearray(range(256)) * 64
def open(readonly): return "handle"
def get_size(h): return len(disk)
def elsewhere(number):
    thread = threading.Thread(target=nbdkit.set_error, args=(number,)); thread.start(); thread.join()
def pread(h, buf, offset, flags):
    calls.append(("pread", len(buf), offset, flags)); buf[:] = disk[offset:offset + len(buf)]
"""
WRITES = """
def pwrite(h, buf, offset, flags):
    assert buf.readonly
    calls.append(("pwrite", len(buf), offset, flags)); disk[offset:offset + len(buf)] = buf
def flush(h, flags): calls.append(("flush", flags))
"""
ALL = (
    BASE
    + WRITES
    + """
def trim(h, count, offset, flags): calls.append(("trim", count, offset, flags))
def zero(h, count, offset, flags): calls.append(("zero", count, offset, flags))
def cache(h, count, offset, flags): calls.append(("cache", count, offset, flags))
def extents(h, count, offset, flags):
    calls.append(("extents", count, offset, flags)); return [(0, 1 << 20, 3)]
"""
)
V1 = """
import errno, nbdkit
calls = []
disk = bytearray(range(256)) * 64
def open(readonly): return None
def get_size(h): return len(disk)
def pread(h, count, offset): calls.append(("pread", count, offset)); return disk[offset:offset + count]
def pwrite(h, buf, offset): calls.append(("pwrite", bytes(buf), offset))
def flush(h): calls.append(("flush",))
def trim(h, count, offset): calls.append(("trim", count, offset))
def zero(h, count, offset, may_trim): calls.append(("zero", count, offset, may_trim))
def cache(h, count, offset, flags): calls.append(("cache", count, offset, flags))
def extents(h, count, offset, flags): return [(offset, count, nbdkit.EXTENT_ZERO)]
"""
FUA, MAY_TRIM, FAST_ZERO, REQ_ONE = wire.FUA, wire.MAY_TRIM, wire.FAST_ZERO, wire.REQ_ONE


class Loaded:
    """A script with an open connection; what it does and reports."""

    def __init__(self, script: Path, readonly: bool = False, export: str = "") -> None:
        self.asked: list[int] = []
        self.server = module.Server(str(script), False, self.asked.append, frozenset())
        self.server.report = self._report  # type: ignore[method-assign]
        self.reported: list[str] = []
        module.install(self.server, wire.SHUTDOWN, wire.DISCONNECT)
        self.plugin = Plugin(self.server)
        self.plugin.load()
        self.connection = Connection(self.plugin, export, readonly)
        self.memory = memoryview(bytearray(wire.SLOT_BYTES))

    def _report(self, text: str) -> None:
        self.reported.append(text)

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self.plugin.main.calls
        return found

    def do(self, op: int, length: int = 512, offset: int = 0, flags: int = 0) -> int:
        return self.connection.request(op, flags, length, offset, self.memory)

    def extents(self, length: int, offset: int = 0, flags: int = 0) -> list[tuple[int, int]] | int:
        count = self.do(wire.STATUS, length, offset, flags)
        if count < 0:
            return count
        size = wire.EXTENT.size
        return [wire.EXTENT.unpack_from(self.memory, n * size) for n in range(count)]


Load = Callable[..., Loaded]


@pytest.fixture
def load(scratch: Path) -> Iterator[Load]:
    kept = sys.modules["__main__"]

    def loaded(source: str, *, opened: bool = True, **options: Any) -> Loaded:
        script = scratch / "script.py"
        script.write_text(source)
        made = Loaded(script, **options)
        if opened:
            made.connection.open()
        return made

    yield loaded
    sys.modules["__main__"] = kept
    sys.modules.pop("nbdkit", None)


def callbacks(**returned: str) -> str:
    return "".join(f"\ndef {name}(h): return {value}\n" for name, value in returned.items())


# ---- what a plugin can do ----


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (BASE, {}),
        (BASE + "def pwrite(h, b, o, f): pass\n", {"can_write": True, "can_fast_zero": True}),
        (BASE + WRITES, {"can_write": True, "can_fast_zero": True, "can_flush": True, "can_fua": 1}),
        (
            ALL,
            {
                "can_write": True,
                "can_zero": True,
                "can_trim": True,
                "can_extents": True,
                "can_flush": True,
                "can_fua": 1,
                "can_cache": 2,
            },
        ),
        (
            ALL + "flush = 5\ntrim = None\n",
            {"can_write": True, "can_zero": True, "can_extents": True, "can_cache": 2},
        ),
        # Only True is true.
        (ALL + callbacks(can_write="1"), {"can_flush": True, "can_extents": True, "can_cache": 2}),
        (ALL + callbacks(can_write="'yes'"), {"can_flush": True, "can_extents": True, "can_cache": 2}),
        (
            ALL
            + callbacks(
                can_zero="1", can_trim="None", can_flush="0", can_extents="[1]", can_fua="0", can_cache="1"
            ),
            {"can_write": True, "can_fast_zero": True, "can_cache": 1},
        ),
        (
            BASE + callbacks(can_multi_conn="True", is_rotational="True", can_cache="nbdkit.CACHE_NATIVE"),
            {"can_multi_conn": True, "is_rotational": True, "can_cache": 2},
        ),
        (
            ALL + callbacks(can_fua="7"),
            {
                "can_fua": 7,
                **{"can_" + n: True for n in ("write", "zero", "trim", "flush")},
                "can_extents": True,
                "can_cache": 2,
            },
        ),
    ],
)
def test_defaults(load: Load, source: str, expected: dict[str, Any]) -> None:
    connection = load(source).connection
    names = (
        *("can_write", "can_zero", "can_fast_zero", "can_trim", "can_fua", "can_flush", "can_cache"),
        *("can_extents", "can_multi_conn", "is_rotational"),
    )
    assert {name: found for name in names if (found := getattr(connection, name))} == expected


def test_a_read_only_connection_asks_nothing_about_writing(load: Load) -> None:
    asking = "".join(f"\ndef {name}(h): 1 / 0\n" for name in ("can_write", "can_zero", "can_trim", "can_fua"))
    connection = load(ALL + asking, readonly=True).connection
    assert not connection.can_write and not connection.can_trim and connection.can_fua == 0


@pytest.mark.parametrize(
    ("source", "reported"),
    [
        (callbacks(can_trim="1 / 0"), "can_trim: error: Traceback"),
        (callbacks(can_fua="None"), "can_fua did not return one of its constants"),
        (callbacks(can_fua="(1 << 32) - 1"), "can_fua did not return one of its constants"),
        (callbacks(can_fua="-1"), "can_fua did not return one of its constants"),
        (callbacks(can_cache="'x'"), "can_cache did not return one of its constants"),
        (callbacks(get_size="None"), "get_size: not a 64 bit integer: None"),
        (callbacks(get_size="1 << 63"), "get_size: not a 64 bit integer"),
        (callbacks(get_size="4096.0"), "get_size: not a 64 bit integer"),
        (callbacks(get_size="-1"), "invalid value (-1)"),
        (callbacks(block_size="[512, 512, 512]"), "block_size method did not return three integers"),
        (callbacks(block_size="(512, 512)"), "block_size method did not return three integers"),
        (callbacks(block_size="(512, 1000, 512)"), "preferred block size to a power of 2"),
        (callbacks(block_size="(1, 64 << 20, 64 << 20)"), "preferred block size between 512 and 32M"),
        (callbacks(block_size="(512, 512, 1000)"), "-1 or a multiple of minimum"),
        (callbacks(block_size="(4096, 512, 8192)"), "minimum block size <= preferred <= maximum"),
        (callbacks(block_size="(1 << 17, 1 << 17, -1)"), "minimum block size between 1 and 64K"),
        ("def open(r): raise ValueError('no')", "open: error: Traceback"),
        ("def preconnect(r): raise ValueError('no')", "preconnect: error: Traceback"),
        ("def default_export(r, t): return 5", "default_export method did not return a string"),
    ],
)
def test_answers_that_end_the_opening(load: Load, source: str, reported: str) -> None:
    loaded = load(ALL + source, opened=False)
    with pytest.raises(Failed):
        loaded.connection.open()
    assert any(reported in line for line in loaded.reported), loaded.reported


def test_a_handle_is_closed_when_the_questions_fail(load: Load) -> None:
    loaded = load(
        ALL + "def close(h): calls.append(('close', h))\n" + callbacks(can_trim="1 / 0"), opened=False
    )
    with pytest.raises(Failed):
        loaded.connection.open()
    assert loaded.calls == [("close", "handle")]


@pytest.mark.parametrize(
    ("returned", "sizes"),
    [
        ("(0, 0, 0)", (0, 0, 0)),
        ("(512, 4096, 65536)", (512, 4096, 65536)),
        ("(1, 512, -1)", (1, 512, 0xFFFFFFFF)),
        ("(True, 512, 0xffffffff)", (1, 512, 0xFFFFFFFF)),
    ],
)
def test_block_sizes(load: Load, returned: str, sizes: tuple[int, int, int]) -> None:
    connection = load(ALL + callbacks(block_size=returned)).connection
    assert (connection.minimum, connection.preferred, connection.maximum) == sizes


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ("", ""),
        (callbacks(export_description="'text'"), "text"),
        (callbacks(export_description="b'bytes\\0more'"), "bytes"),
        (callbacks(export_description="5"), ""),
        (callbacks(export_description="1 / 0"), ""),
    ],
)
def test_description(load: Load, source: str, description: str) -> None:
    assert load(ALL + source).connection.description == description


def test_order_of_the_callbacks(load: Load) -> None:
    names = (
        *("can_write", "can_zero", "can_fast_zero", "can_trim", "can_fua", "can_flush", "is_rotational"),
        *("can_multi_conn", "can_cache", "can_extents", "export_description", "close"),
    )
    traced = "".join(
        f"\ndef {name}(h): calls.append({name!r}); return {1 if name in ('can_fua', 'can_cache') else True}\n"
        for name in names
    )
    first = """
def preconnect(r): calls.append(("preconnect", r))
def default_export(r, t): calls.append(("default_export", r, t)); return "it"
def open(r): calls.append(("open", r, nbdkit.export_name())); return 0
def get_size(h): calls.append("get_size"); return 1
def block_size(h): calls.append("block_size"); return 0, 0, 0
"""
    loaded = load(ALL + traced + first)
    loaded.connection.close()
    calls: list[Any] = loaded.calls
    assert calls[:4] == [
        ("preconnect", False),
        ("default_export", False, False),
        ("open", False, "it"),
        "get_size",
    ]
    assert calls[4:] == [*names[:-1], "block_size", "close"]


def test_a_named_export_is_not_the_default(load: Load) -> None:
    loaded = load(
        ALL + "def default_export(r, t): 1 / 0\ndef open(r): return nbdkit.export_name()\n", export="given"
    )
    assert loaded.connection.handle == "given"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[]", []),
        ("['a', ('b', 'second'), (b'c', b'third')]", [("a", ""), ("b", "second"), ("c", "third")]),
        ("iter(('x',))", [("x", "")]),
        ("None", "did not return something which is iterable"),
        ("[1]", "did not return an iterable of 2-tuples"),
        ("[('a', 'b', 'c')]", "did not return an iterable of 2-tuples"),
        ("[['a', 'b']]", "did not return an iterable of 2-tuples"),
        ("[('a', 1)]", "did not return an iterable of string 2-tuples"),
    ],
)
def test_list_exports(load: Load, returned: str, expected: object) -> None:
    loaded = load(ALL + f"def list_exports(r, t): return {returned}\n")
    if isinstance(expected, str):
        with pytest.raises(Failed, match=expected):
            loaded.plugin.list_exports(False)
    else:
        assert loaded.plugin.list_exports(False) == expected


@pytest.mark.parametrize(
    ("returned", "model"),
    [("0", 0), ("nbdkit.THREAD_MODEL_PARALLEL", 3), ("9", 3), ("True", 1), ("'x'", None), ("-1", None)],
)
def test_thread_model(load: Load, returned: str, model: int | None) -> None:
    loaded = load(ALL + f"def thread_model(): return {returned}\n")
    if model is None:
        with pytest.raises(Failed):
            loaded.plugin.thread_model()
    else:
        assert loaded.plugin.thread_model() == model
    assert load(ALL).plugin.thread_model() == 1


@pytest.mark.parametrize(
    ("version", "api"),
    [("1", 1), ("2", 2), ("True", 1), ("0", None), ("3", None), ("'2'", None), ("2.0", None), ("None", None)],
)
def test_versions_of_the_interface(load: Load, version: str, api: int | None) -> None:
    if api is None:
        with pytest.raises(Failed, match="API_VERSION requested unknown version"):
            load(ALL + f"API_VERSION = {version}\n")
    else:
        assert load(ALL + f"API_VERSION = {version}\n", opened=False).plugin.api == api
    assert load(V1).plugin.api == 1


# ---- requests ----


def test_requests_of_version_2(load: Load) -> None:
    loaded = load(ALL + callbacks(can_fua="nbdkit.FUA_NATIVE", can_fast_zero="True"))
    assert loaded.do(wire.READ, 300, 5) == 0
    assert bytes(loaded.memory[:300]) == bytes(loaded.plugin.main.disk[5:305])
    assert loaded.do(wire.WRITE, 512, 1, FUA) == 0
    assert loaded.do(wire.ZEROES, 4096, 4096, FUA | MAY_TRIM | FAST_ZERO) == 0
    assert loaded.do(wire.DISCARD, 100, 7, FUA) == 0
    assert loaded.do(wire.CACHE, 100, 8) == 0
    assert loaded.do(wire.FLUSH, 0, 0) == 0
    assert loaded.extents(512, 9, REQ_ONE) == [(512, 3)]
    assert loaded.calls == [
        ("pread", 300, 5, 0),
        ("pwrite", 512, 1, FUA),
        ("zero", 4096, 4096, FUA | MAY_TRIM | FAST_ZERO),
        ("trim", 100, 7, FUA),
        ("cache", 100, 8, 0),
        ("flush", 0),
        ("extents", 512, 9, REQ_ONE),
    ]


def test_requests_of_version_1(load: Load) -> None:
    loaded = load(V1)
    loaded.memory[:2] = b"ab"
    assert loaded.do(wire.WRITE, 2, 3, FUA) == 0
    assert loaded.do(wire.READ, 300, 5) == 0
    assert bytes(loaded.memory[:300]) == bytes(loaded.plugin.main.disk[5:305])
    assert loaded.do(wire.ZEROES, 10, 20, MAY_TRIM) == 0
    assert loaded.do(wire.ZEROES, 10, 20) == 0
    assert loaded.do(wire.DISCARD, 10, 20) == 0
    assert loaded.do(wire.CACHE, 10, 20) == 0
    assert loaded.extents(512, 9) == [(512, 2)]
    assert loaded.calls == [
        ("pwrite", b"ab", 3),
        ("flush",),
        ("pread", 300, 5),
        ("zero", 10, 20, True),
        ("zero", 10, 20, False),
        ("trim", 10, 20),
        ("cache", 10, 20, 0),
    ]


@pytest.mark.parametrize(
    ("returned", "reported"),
    [
        ("b'short'", "buffer returned from pread is too small"),
        ("None", "value returned from pread does not support the buffer protocol"),
        ("'text'", "value returned from pread does not support the buffer protocol"),
    ],
)
def test_wrong_data_in_version_1(load: Load, returned: str, reported: str) -> None:
    loaded = load(V1 + f"def pread(h, count, offset): return {returned}\n")
    assert loaded.do(wire.READ) == -errno.EIO
    assert reported in loaded.reported[-1]


@pytest.mark.parametrize(
    "returned",
    ["bytes(600)", "bytearray(512)", "memoryview(bytes(512))", "__import__('array').array('I', [0] * 200)"],
)
def test_buffers_in_version_1(load: Load, returned: str) -> None:
    loaded = load(V1 + f"def pread(h, count, offset): return {returned}\n")
    loaded.memory[:513] = b"x" * 513
    assert loaded.do(wire.READ) == 0
    assert bytes(loaded.memory[:513]) == bytes(512) + b"x"


def test_emulated_fua_flushes(load: Load) -> None:
    loaded = load(ALL)
    for op in (wire.WRITE, wire.DISCARD, wire.ZEROES):
        assert loaded.do(op, 512, 0, FUA) == 0
    assert [call[0] for call in loaded.calls] == ["pwrite", "flush", "trim", "flush", "zero", "flush"]
    assert all(call[-1] == 0 for call in loaded.calls)


def test_what_it_cannot_do_is_not_asked_for(load: Load) -> None:
    loaded = load(
        ALL + callbacks(can_flush="False", can_trim="False", can_cache="0", can_extents="False", can_fua="0")
    )
    for op in (wire.FLUSH, wire.DISCARD, wire.CACHE):
        assert loaded.do(op) == 0
    assert loaded.do(wire.WRITE, 512, 0, FUA) == 0
    assert loaded.extents(512, 5) == [(512, 0)]
    assert [call[0] for call in loaded.calls] == ["pwrite"]


def test_emulated_caching_reads(load: Load) -> None:
    loaded = load(ALL + callbacks(can_cache="nbdkit.CACHE_EMULATE"))
    assert loaded.do(wire.CACHE, 1000, 24) == 0
    assert loaded.calls == [("pread", 1000, 24, 0)]


@pytest.mark.parametrize(
    "body", ["nbdkit.set_error(errno.EOPNOTSUPP); raise Exception", "nbdkit.set_error(errno.ENOTSUP)"]
)
def test_zero_falls_back_to_writing(load: Load, body: str) -> None:
    loaded = load(
        BASE + WRITES + f"def zero(h, count, offset, flags): {body}\n" + callbacks(can_fast_zero="True")
    )
    assert loaded.do(wire.ZEROES, 4096, 512, MAY_TRIM) == 0
    assert loaded.calls == [("pwrite", 4096, 512, 0)]
    assert loaded.plugin.main.disk[512:4608] == bytes(4096)
    assert loaded.do(wire.ZEROES, 4096, 512, FAST_ZERO) == -errno.EOPNOTSUPP
    assert len(loaded.calls) == 1 and not loaded.reported


def test_zero_that_fails_otherwise_does_not_fall_back(load: Load) -> None:
    loaded = load(
        BASE + WRITES + "def zero(h, count, offset, flags): nbdkit.set_error(errno.ENOSPC); 1 / 0\n"
    )
    assert loaded.do(wire.ZEROES) == -errno.ENOSPC
    assert loaded.calls == []


@pytest.mark.parametrize(("source", "fast"), [("", True), (callbacks(can_fast_zero="False"), False)])
def test_fast_zero_without_zero_fails_fast(load: Load, source: str, fast: bool) -> None:
    loaded = load(BASE + WRITES + source)
    assert loaded.connection.can_fast_zero is fast
    assert loaded.do(wire.ZEROES, 512, 0, FAST_ZERO) == -errno.EOPNOTSUPP
    assert loaded.calls == []
    assert loaded.do(wire.ZEROES) == 0
    assert loaded.calls == [("pwrite", 512, 0, 0)]


def test_long_zeroes_are_written_piece_by_piece(load: Load) -> None:
    loaded = load(
        BASE
        + "def get_size(h): return 1 << 40\n"
        + "def pwrite(h, buf, offset, flags): calls.append((len(buf), offset, any(buf[:9])))\n"
    )
    assert loaded.do(wire.ZEROES, 150 << 20, 1 << 30) == 0
    mib = 1 << 20
    assert loaded.calls == [
        (64 * mib, 1024 * mib, False),
        (64 * mib, 1088 * mib, False),
        (22 * mib, 1152 * mib, False),
    ]


def test_callbacks_are_looked_up_each_time(load: Load) -> None:
    loaded = load(ALL)
    main: Any = loaded.plugin.main
    for name, op in (
        ("pread", wire.READ),
        ("pwrite", wire.WRITE),
        ("flush", wire.FLUSH),
        ("trim", wire.DISCARD),
    ):
        delattr(main, name)
        assert loaded.do(op) == -errno.EIO
        assert name in loaded.reported[-1]
    del main.zero
    main.pwrite = lambda h, buf, offset, flags: main.calls.append("new")
    assert loaded.do(wire.ZEROES) == 0
    assert main.calls == ["new"]
    main.cache = 5
    assert loaded.do(wire.CACHE) == -errno.EIO
    assert any("object cache isn't callable" in line for line in loaded.reported)


# ---- errors ----


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("raise ValueError", errno.EIO),
        ("nbdkit.set_error(errno.ENOSPC); raise ValueError", errno.ENOSPC),
        ("nbdkit.set_error(errno.EDQUOT); raise ValueError", errno.ENOSPC),
        ("nbdkit.set_error(errno.EROFS); raise ValueError", errno.EPERM),
        ("nbdkit.set_error(errno.EACCES); raise ValueError", errno.EINVAL),
        ("nbdkit.set_error(errno.ENOENT); raise ValueError", errno.EINVAL),
        ("nbdkit.set_error(errno.ESHUTDOWN); raise ValueError", errno.ESHUTDOWN),
        ("nbdkit.set_error(errno.ENOMEM); raise ValueError", errno.ENOMEM),
        ("nbdkit.set_error(99999); raise ValueError", errno.EINVAL),
        ("nbdkit.set_error(-5); raise ValueError", errno.EINVAL),
        ("nbdkit.set_error(28); nbdkit.set_error(0); raise ValueError", errno.EIO),
        ("nbdkit.set_error('28')", errno.EIO),
        ("nbdkit.set_error(28.0)", errno.EIO),
        ("nbdkit.set_error(1 << 40)", errno.EIO),
        ("raise SystemExit(3)", errno.EIO),
        ("raise KeyboardInterrupt", errno.EIO),
        ("elsewhere(28); raise ValueError", errno.EIO),
        ("return 1, 2, 3, 4", errno.EIO),
        ("nbdkit.set_error(28)", 0),
    ],
)
def test_errno_of_a_failure(load: Load, body: str, number: int) -> None:
    extra = (
        "def pread(h, a, b, c, d): pass\n"
        if body.startswith("return")
        else f"def pread(h, b, o, f):\n    {body}\n"
    )
    loaded = load(ALL + extra)
    assert loaded.do(wire.READ) == -number
    if number:
        assert "/script.py: pread: error: " in loaded.reported[-1]


def test_an_error_is_of_its_own_request_only(load: Load) -> None:
    loaded = load(ALL + "def pread(h, b, o, f):\n    if o: nbdkit.set_error(28)\n    raise ValueError\n")
    assert loaded.do(wire.READ, 1, 1) == -errno.ENOSPC
    assert loaded.do(wire.READ, 1, 0) == -errno.EIO


# ---- block status ----


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[(0, 8192, 1)]", [(4096, 1)]),
        ("[(4096, 512, 0), (4608, 1 << 40, 3)]", [(512, 0), (3584, 3)]),
        ("[(4096, 512, 2), (4608, 512, 2), (5120, 512, 0)]", [(1024, 2), (512, 0)]),
        ("((4096 + i, 1, i) for i in range(3))", [(1, 0), (1, 1), (1, 2)]),
        ("[(0, 4097, 7)]", [(1, 3)]),
        ("[(4096, 0, 1), (4096, 512, 2)]", [(512, 2)]),
        ("[(4096, 512, 1 << 33)]", [(512, 0)]),
        ("{(4096, 512, 1): 5}", [(512, 1)]),
        ("(((4096, 512, 1) if i < 1 else 1 // 0) for i in range(3))", [(512, 1)]),
        ("[(False, 5000, True)]", [(904, 1)]),
        ("[(4097, 512, 0)]", -errno.EIO),
        ("[(8192, 512, 0)]", -errno.EIO),
        ("[(16384, 512, 0)]", -errno.EINVAL),
        ("[(0, 4096, 0)]", -errno.EINVAL),
        ("[(4096, 0, 0)]", -errno.EINVAL),
        ("[(4096, 512, 0), (5000, 512, 0)]", -errno.EIO),
        ("[(4096, 512, 0), (4200, 512, 0)]", -errno.EIO),
        ("[]", -errno.EIO),
        ("(1 // 0 for i in range(3))", -errno.EIO),
        ("None", -errno.EIO),
        ("[[4096, 512, 0]]", -errno.EIO),
        ("[(4096, 512)]", -errno.EIO),
        ("[(4096, '512', 0)]", -errno.EIO),
        ("[(4096, 512.0, 0)]", -errno.EIO),
        ("[(4096, -1, 0)]", -errno.EIO),
        ("1 / 0", -errno.EIO),
    ],
)
def test_extents(load: Load, returned: str, expected: list[tuple[int, int]] | int) -> None:
    loaded = load(BASE + f"def extents(h, count, offset, flags): return {returned}\n")
    assert loaded.extents(4096, 4096) == expected


def test_one_extent_when_one_is_wanted(load: Load) -> None:
    loaded = load(
        BASE + "def extents(h, count, offset, flags): return [(0, 512, flags & 3), (512, 512, 3)]\n"
    )
    assert loaded.extents(4096, 0, REQ_ONE) == [(512, 0)]


def test_more_extents_than_a_slot_holds(load: Load) -> None:
    loaded = load(
        BASE
        + "def get_size(h): return 1 << 20\n"
        + "def extents(h, count, offset, flags): return ((i, 1, i & 1) for i in range(1 << 20))\n"
    )
    found = loaded.extents(1 << 20)
    assert isinstance(found, list) and len(found) == wire.EXTENTS_MAX
