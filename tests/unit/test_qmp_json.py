# SPDX-License-Identifier: Apache-2.0
"""Messages in a stream of JSON: what is taken, how errors are worded, where it goes on after them, limits."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from target.qmp.json_stream import MAX_NESTING, MAX_SIZE, MAX_TOKENS, Budget, JsonStream

NEXT = b'{"execute":"x","id":9}'
NEXT_VALUE = {"execute": "x", "id": 9}
ERROR = "JSON parse error, "


def messages(data: bytes, step: int = 0) -> list[Any]:
    """Values and texts of errors, of data that comes in pieces of ``step`` bytes."""
    stream = JsonStream()
    found: list[Any] = []
    step = step or max(1, len(data))
    for start in range(0, len(data), step):
        stream.feed(data[start : start + step])
        while (message := stream.next()) is not None:
            found.append(message.value if message.error is None else message.error)
    return found


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"1 ", [1]),
        (b"1", []),  # it may go on
        (b"{}[]", [{}, []]),
        (b'"a"\'b"\'', ["a", 'b"']),
        (b"{'a':'b'}", [{"a": "b"}]),
        (b"true false null ", [True, False, None]),
        (b'{"a":{"b":[1,[2],{}]}}\r\n\t ', [{"a": {"b": [1, [2], {}]}}]),
        (b'"\\u00e9\\ud83d\\ude00\\n\\/\\\'"', ["é😀\n/'"]),
        (b'"\xc3\xa9\xc0\x80\\u0000"', ["é\0\0"]),
        (b"[-0,1E5,0.5,1.5e-3]", [[0, 1e5, 0.5, 0.0015]]),
        (b"[18446744073709551615,-9223372036854775808]", [[(1 << 64) - 1, -(1 << 63)]]),
        (b"[18446744073709551616,-9223372036854775809]", [[float(1 << 64), -float(1 << 63)]]),
        (b"[1e400,-1e400]", [[1.7976931348623157e308, -1.7976931348623157e308]]),
    ],
)
def test_values(data: bytes, values: list[Any]) -> None:
    assert messages(data) == values
    assert messages(data, 1) == values


@pytest.mark.parametrize(
    ("data", "errors"),
    [
        (b"nul ", ["invalid keyword 'nul'"]),
        (b"{,}", ["expecting value"]),
        (b'{"a":}', ["expecting value"]),
        (b'{"a":1,}', ["expecting value"]),
        (b'{"a" 1}', ["missing : in object pair"]),
        (b'{"a":1 2}', ["expected separator in dict"]),
        (b"[1 2]", ["expected separator in list"]),
        (b"[1,]", ["expecting value"]),
        (b"{1:2}", ["key is not a string in object"]),
        (b"{[1]:2}", ["key is not a string in object"]),
        (b'{"a":1,"a":2}', ["duplicate key"]),
        (b"[}", ["expecting value"]),
        (b"[{]}", ["expecting value"]),
        (b"]", ["expecting value"]),
        (b":", ["expecting value"]),
        (b"\xff", ["stray '�'"]),
        (b'{"a":\xff', ["stray '�'"]),
        (b"\x00", ["stray '\0'"]),
        (b'"\x01"', ["stray '\"\x01'"]),
        (b"01", ["stray '01'"]),
        (b"NaN", ["stray 'N'"]),
        (b'{"a":NaN}', ["stray 'N'", "expecting value"]),
        (b"%p", ["stray '%'"]),
        (b"1.}", ["stray '1.}'"]),
        (b'"\xed\xa0\x80"', ["invalid UTF-8 sequence in string"]),
        (b'"\xff"', ["stray '\"�'"]),
        (b'"\\x"', ["invalid escape sequence in string"]),
        (b'"\\u12"', ['\\u12" is not a valid Unicode character']),
        (b'"\\ud800"', ["\\ud800 is not a valid Unicode character"]),
        (b'"\\udc00\\ud800"', ["\\udc00 is not a valid Unicode character"]),
        (b'"\\uffff"', ["\\uffff is not a valid Unicode character"]),
    ],
)
def test_errors_and_what_follows_them(data: bytes, errors: list[str]) -> None:
    wanted = [*(ERROR + error for error in errors), NEXT_VALUE]
    follow = b"\n" + NEXT
    assert messages(data + follow) == wanted
    assert messages(data + follow, 1) == wanted


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1), "JSON nesting depth limit exceeded"),
        (b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1), "JSON nesting depth limit exceeded"),
        (b"[" + b"0," * MAX_TOKENS + b"0]", "JSON token count limit exceeded"),
        (b'"' + b"x" * (MAX_SIZE + 1) + b'"', "JSON token size limit exceeded"),
        (b'["' + b"x" * (2 * MAX_SIZE) + b'",{"a":["b"]}]', "JSON token size limit exceeded"),
        (b"9" * 100_000, ERROR + "a number or keyword is longer than 1024 bytes"),
        (b"x" * 100_000, ERROR + "a number or keyword is longer than 1024 bytes"),
    ],
    ids=["arrays", "objects", "tokens", "string", "nested string", "number", "word"],
)
@pytest.mark.parametrize("step", [0, 4096])
def test_what_is_too_large_is_one_error_and_skipped(data: bytes, error: str, step: int) -> None:
    assert messages(data + b"\n" + NEXT, step) == [error, NEXT_VALUE]


def test_streams_share_a_budget() -> None:
    budget = Budget(3 << 20)
    streams = [JsonStream(budget) for _ in range(4)]
    for stream in streams:
        take_all(stream, b'["' + b"x" * (1 << 20))
    assert budget.left < 256 << 10
    streams[3].feed(b"x" * 100)
    assert streams[3].next() is None  # it was told before, and is skipped
    streams[0].feed(b'"]')
    message = streams[0].next()
    assert message is not None and message.error is None and message.held > 900 << 10
    budget.left += message.held
    for stream in streams:
        stream.close()
    assert budget.left == 3 << 20


def test_what_is_just_small_enough_is_taken() -> None:
    nested = b"[" * MAX_NESTING + b"]" * MAX_NESTING
    assert len(messages(nested)) == 1 and isinstance(messages(nested)[0], list)
    assert messages(b'"' + b"x" * (MAX_SIZE - 2) + b'"') == ["x" * (MAX_SIZE - 2)]


@pytest.mark.parametrize(
    "piece", [b"[", b'{"a":', b"x", b"9", b'"', b'"a', b'\\"', b"0,", b"{},", b'{"":0},'], ids=repr
)
def test_endless_input_takes_bounded_memory_and_time(piece: bytes) -> None:
    """More of it than the limits, in pieces of 2 KiB: none takes long, and nothing that grows is kept."""
    chunk = (piece * 2048)[:2048]
    start = b'["' if piece.startswith(b"\\") else b"["
    slowest = 0.0
    stream = JsonStream()
    stream.feed(start)
    for _ in range(5 << 9):
        before = time.thread_time()
        take_all(stream, chunk)
        slowest = max(slowest, time.thread_time() - before)
    assert slowest < 1, slowest
    stream = JsonStream()
    stream.feed(start)
    tracemalloc.start()
    try:
        for _ in range(5 << 9):
            take_all(stream, chunk)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20, peak
    assert current < 9 << 20, current


def take_all(stream: JsonStream, data: bytes) -> None:
    stream.feed(data)
    while stream.next() is not None:
        pass


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cn"))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc\"\\'é"), inner),
)


@given(values=st.lists(JSON, min_size=1, max_size=4), ascii=st.booleans(), step=st.integers(1, 20))
@settings(deadline=None)
def test_any_json_in_any_pieces(values: list[Any], ascii: bool, step: int) -> None:
    data = b"".join(json.dumps(value, ensure_ascii=ascii).encode() + b"\n" for value in values)
    assert messages(data, step) == values


@given(
    data=st.binary(max_size=60) | st.text("{}[]:,\"'\\ua0e.-+ \n\x01").map(str.encode), step=st.integers(1, 9)
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_in_any_pieces_mean_the_same(data: bytes, step: int) -> None:
    assert repr(messages(data, step)) == repr(messages(data))
    found = messages(data + b"\xff\n" + NEXT, step)
    assert found[-1] == NEXT_VALUE  # 0xFF forces a fresh start
