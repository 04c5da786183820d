# SPDX-License-Identifier: Apache-2.0
"""From a backing name to options; probing of formats by magic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from target.drivers.format.probe import probe, probe_file, protocol_driver
from target.drivers.format.qcow2.backing import backing_options
from target.drivers.format.qcow2.create import Plan, pieces
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import parse


def options(name: str | None, format: str | None = None, overlay: str | None = "/dir/top.qcow2") -> Any:
    plan = Plan(size=1 << 20, backing_file=name, backing_format=format)
    header = parse(pieces(plan)[0][1].ljust(65536, b"\0"), 1 << 20)
    return backing_options(header, overlay)


def test_no_backing() -> None:
    assert options(None) is None


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base", "/dir/base"),
        ("../base", "/dir/../base"),
        ("/abs/base", "/abs/base"),
        ("file:base", "/dir/base"),
        ("file:/abs", "/abs"),
        ("host_device:/abs", "/abs"),
        ("sub/a:b", "/dir/sub/a:b"),
    ],
)
def test_names(name: str, path: str) -> None:
    file = {"driver": "file", "filename": path}
    assert options(name, "qcow2") == {"driver": "qcow2", "file": file}
    assert options(name, "file") == file


def test_json() -> None:
    inner = {"driver": "file", "filename": "x"}
    expected = {"driver": "qcow2", "file": inner, "l2-cache-size": 1}
    nested = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"x"},"l2-cache-size":1}'
    flat = 'json:{"file.filename":"x","l2-cache-size":1,"file.driver":"file"}'
    assert options(nested) == expected
    assert options(flat, "qcow2") == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nbd://h/x", "protocol 'nbd'"),
        ("http:x", "protocol 'http'"),
        ("no_such-protocol:x", "protocol 'no_such-protocol'"),
        ("json:", "not valid JSON"),
        ("json:" + "[" * 1000, "not valid JSON"),
        ("json:3", "not a JSON object"),
        ("json:{}", "names no driver"),
        ('json:{"driver":"raw","file":"a","file.driver":"b"}', "inconsistently"),
    ],
)
def test_names_that_cannot_be_used(name: str, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        options(name)


def test_relative_name_without_a_file() -> None:
    with pytest.raises(ImageError, match="relative"):
        options("base", "raw", None)


def test_a_name_cannot_break_the_line() -> None:
    with pytest.raises(ImageError) as caught:
        options("x:\n\x1b[2J")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_missing_file_whose_format_is_not_stated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        options("absent", None, str(tmp_path / "top"))


@pytest.mark.parametrize(
    ("data", "driver"),
    [
        (b"", "raw"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (bytes(2048), "raw"),
    ],
)
def test_probe(data: bytes, driver: str) -> None:
    assert probe(data) == driver


def test_probe_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"QFI\xfb\0\0\0\3")
    os.mkfifo(tmp_path / "fifo")
    assert probe_file(str(tmp_path / "a")) == "qcow2"
    assert probe_file(str(tmp_path / "fifo")) == "raw"
    assert protocol_driver(str(tmp_path / "a")) == "file"
    assert protocol_driver(str(tmp_path / "absent")) == "file"
