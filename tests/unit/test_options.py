# SPDX-License-Identifier: Apache-2.0
"""Values against types: what each notation may say, and the words for what is wrong."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from target import drivers
from target.config.options import Notation, OptionError, Size, parse, parse_size
from target.exports.address import SocketAddress, UnixAddress
from target.graph import registry
from target.graph.options import BlockdevRef

KEYVAL, JSON, YAML = Notation.KEYVAL, Notation.JSON, Notation.YAML

drivers.load()


class Inner(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    no_flush: bool = False


class Options(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    name: str = "x"
    flag: bool = False
    count: int = 0
    room: Size = 0
    mode: Literal["off", "on", "unmap"] = "off"
    inner: Inner | None = None
    many: str | list[str] | None = None
    addr: SocketAddress | None = None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("0x1000", 4096),
        ("64k", 65536),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("1b", 1),
        ("1P", 1 << 50),
        ("0.5k", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "1kk", "one", "1.k.5", "1_000", "1,5", "1.5", "1.5b", "12Q", ".", "1e3"]
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("notation", "value", "field", "wanted"),
    [
        (KEYVAL, {"flag": "on"}, "flag", True),
        (KEYVAL, {"flag": "no"}, "flag", False),
        (KEYVAL, {"count": "-0x10"}, "count", -16),
        (KEYVAL, {"room": "4k"}, "room", 4096),
        (KEYVAL, {"inner": {"no-flush": "on"}}, "inner", Inner(no_flush=True)),
        (KEYVAL, {"many": "a"}, "many", "a"),
        (KEYVAL, {"many": ["a", "b"]}, "many", ["a", "b"]),
        (KEYVAL, {"addr": {"type": "unix", "path": "p"}}, "addr", UnixAddress(path="p")),
        (JSON, {"flag": True}, "flag", True),
        (JSON, {"room": 4096}, "room", 4096),
        (YAML, {"inner": None}, "inner", None),
        (YAML, {"room": "4k"}, "room", 4096),
        (YAML, {"name": 10809}, "name", "10809"),
        (YAML, {"mode": True}, "mode", "on"),
        (YAML, {"mode": False}, "mode", "off"),
    ],
)
def test_values(notation: Notation, value: dict[str, Any], field: str, wanted: Any) -> None:
    assert getattr(parse(value, Options, notation), field) == wanted


@pytest.mark.parametrize(
    ("notation", "value", "message"),
    [
        (KEYVAL, {"flag": "maybe"}, "Parameter 'flag' expects 'on' or 'off'"),
        (KEYVAL, {"count": "1k"}, "Parameter 'count' expects integer"),
        (KEYVAL, {"room": "lots"}, "Parameter 'room' expects a size, such as 512, 64k or 1.5G"),
        (KEYVAL, {"room": "-1"}, "Parameter 'room': expected `int` >= 0"),
        (KEYVAL, {"room": "16E"}, "Parameter 'room': expected `int` <= 9223372036854775807"),
        (KEYVAL, {"inner": "1"}, "Invalid parameter type for 'inner', expected: object"),
        (KEYVAL, {"inner": {"x": "1"}}, "Parameter 'inner.x' is unexpected"),
        (KEYVAL, {"name": {"x": "1"}}, "Invalid parameter type for 'name', expected: string"),
        (KEYVAL, {"mode": "aus"}, "Parameter 'mode' does not accept value 'aus'"),
        (KEYVAL, {"addr": {"path": "p"}}, "Parameter 'addr.type' is missing"),
        (KEYVAL, {"addr": {"type": "tape"}}, "Parameter 'addr.type' does not accept value 'tape'"),
        (KEYVAL, {"addr": {"type": "unix"}}, "Parameter 'addr.path' is missing"),
        (KEYVAL, {"addr": {"type": "unix", "path": "p", "host": "h"}}, "Parameter 'addr.host' is unexpected"),
        (JSON, {"flag": "on"}, "Invalid parameter type for 'flag', expected: boolean"),
        (JSON, {"count": "1"}, "Invalid parameter type for 'count', expected: integer"),
        (JSON, {"count": True}, "Invalid parameter type for 'count', expected: integer"),
        (JSON, {"count": 1.5}, "Invalid parameter type for 'count', expected: integer"),
        (JSON, {"name": 1}, "Invalid parameter type for 'name', expected: string"),
        (JSON, {"count": 1 << 63}, "Invalid parameter type for 'count', expected: integer"),
        (JSON, {"room": -(1 << 63) - 1}, "Invalid parameter type for 'room', expected: integer"),
        (JSON, {"inner": None}, "Invalid parameter type for 'inner', expected: object"),
        (JSON, {"many": [1]}, "Invalid parameter type for 'many[0]', expected: string"),
        (JSON, {"name": "a\0b"}, "Parameter 'name' must not contain a null character"),
        (JSON, {"mode": 1}, "Invalid parameter type for 'mode', expected: string"),
        (JSON, {"nam": 1}, "Parameter 'nam' is unexpected"),
        (YAML, {"name": True}, "Invalid parameter type for 'name', expected: string"),
    ],
)
def test_errors(notation: Notation, value: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as info:
        parse(value, Options, notation)
    assert str(info.value) == message


def test_inline_children_are_parsed_with_their_parent() -> None:
    value = {
        "driver": "raw",
        "file": {"driver": "null-co", "size": "1M", "read-zeroes": "on"},
        "offset": "1k",
    }
    ref = registry.parse_blockdev(value, KEYVAL)
    options: Any = ref.options
    child = options.file
    assert isinstance(child, BlockdevRef)
    assert child.driver == "null-co"
    inner: Any = child.options
    assert (inner.size, inner.read_zeroes) == (1 << 20, True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"driver": "raw"}, "Parameter 'file' is missing"),
        (
            {"driver": "raw", "file": {"driver": "tape"}},
            "Parameter 'file.driver' does not accept value 'tape'",
        ),
        ({"driver": "raw", "file": {"filename": "x"}}, "Parameter 'file.driver' is missing"),
        ({"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
        (
            {"driver": "raw", "file": {"driver": "file", "filename": "x", "y": 1}},
            "Parameter 'file.y' is unexpected",
        ),
        ({"driver": "raw", "file": 3}, "Invalid parameter type for 'file', expected: BlockdevRef"),
        ({"driver": 3}, "Invalid parameter type for 'driver', expected: string"),
        ({}, "Parameter 'driver' is missing"),
        ([], "Invalid parameter type for 'blockdev', expected: object"),
    ],
)
def test_errors_in_nested_options_have_their_path(value: Any, message: str) -> None:
    with pytest.raises(OptionError) as info:
        registry.parse_blockdev(value)
    assert str(info.value) == message


@pytest.mark.parametrize("option", ["x-check-cache-dropped", "x-no-such"])
def test_options_of_file_that_are_not_built_are_refused_by_name(option: str) -> None:
    with pytest.raises(OptionError, match=option):
        registry.parse_blockdev({"driver": "file", "filename": "x", option: "y"}, KEYVAL)
