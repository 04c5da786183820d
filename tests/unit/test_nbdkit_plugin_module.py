# SPDX-License-Identifier: Apache-2.0
"""The module that a plugin imports: notations, passwords, errors, and what needs a client."""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from target.nbdkit import module, parse


@pytest.fixture
def server() -> module.Server:
    server = module.Server("script.py", False, lambda kind: None, frozenset())
    server.export_name = "name"
    return server


@pytest.fixture
def nbdkit(server: module.Server) -> Iterator[Any]:
    module.install(server, 1, 2)
    yield sys.modules.pop("nbdkit")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("007", 7),
        (" 10", 10),
        ("\t+10", 10),
        ("1b", 1),
        ("1K", 1024),
        ("2k", 2048),
        ("3M", 3 << 20),
        ("4g", 4 << 30),
        ("5T", 5 << 40),
        ("6p", 6 << 50),
        ("7E", 7 << 60),
        ("3s", 1536),
        ("3S", 1536),
        ("9223372036854775807", (1 << 63) - 1),
        ("-0", 0),
    ],
)
def test_size(nbdkit: Any, text: str, size: int) -> None:
    assert nbdkit.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "-1",
        "1 ",
        "1.5M",
        "0x10",
        "1KB",
        "1KiB",
        "1M1",
        "9223372036854775808",
        "8E",
        "1q",
        "1\u00b2",
    ],
)
def test_no_size(nbdkit: Any, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as size"):
        nbdkit.parse_size(text)


@pytest.mark.parametrize("value", [5, None, b"5"])
def test_size_of_what_is_no_text(nbdkit: Any, value: object) -> None:
    with pytest.raises(TypeError):
        nbdkit.parse_size(value)


@pytest.mark.parametrize(
    ("text", "delay"),
    [
        ("1", (1, 0)),
        ("1.2", (1, 200_000_000)),
        ("1.2s", (1, 200_000_000)),
        ("1.2ms", (0, 1_200_000)),
        ("120ms", (0, 120_000_000)),
        ("1200ms", (1, 200_000_000)),
        ("1.2us", (0, 1200)),
        ("120\u03bcs", (0, 120_000)),
        ("120\u00b5s", (0, 120_000)),
        ("1ns", (0, 1)),
        ("1e3ns", (0, 1000)),
        ("0", (0, 0)),
    ],
)
def test_delay(nbdkit: Any, text: str, delay: tuple[int, int]) -> None:
    assert nbdkit.parse_delay("what", text) == delay


@pytest.mark.parametrize("text", ["", "s", "-1", "1m", "1 s", "inf", "nan", "1e30", "0.1ns"])
def test_no_delay(nbdkit: Any, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as delay"):
        nbdkit.parse_delay("what", text)


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("0.1", 0.1),
        ("1e-1", 0.1),
        ("10%", 0.1),
        ("1:10", 0.1),
        ("1/10", 0.1),
        ("200%", 2.0),
        ("0", 0.0),
        ("0:0", 0.0),
        ("0x1p-1", 0.5),
        (" 1", 1.0),
    ],
)
def test_probability(nbdkit: Any, text: str, probability: float) -> None:
    assert math.isclose(nbdkit.parse_probability("what", text), probability)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1:0", "1/0", "1:", "1:2:3", "1%%", "10 %", "inf", "nan", "1:10%"]
)
def test_no_probability(nbdkit: Any, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as probability"):
        nbdkit.parse_probability("what", text)


def test_password(nbdkit: Any, scratch: Path) -> None:
    file = scratch / "password"
    file.write_bytes(b"first line\nsecond\n")
    assert nbdkit.read_password("plain \u00fc") == "plain \u00fc".encode()
    assert nbdkit.read_password("+" + str(file)) == b"first line"
    assert nbdkit.read_password(f"-{os.open(file, os.O_RDONLY)}") == b"first line"
    file.write_bytes(b"")
    assert nbdkit.read_password("+" + str(file)) == b""
    file.write_bytes(b"no newline")
    assert nbdkit.read_password("+" + str(file)) == b"no newline"


@pytest.mark.parametrize("value", ["-", "-0", "-1", "-2", "-x", "-99999", "-", "+", "+/no/such/file", "--5"])
def test_no_password(nbdkit: Any, value: str) -> None:
    with pytest.raises(RuntimeError):
        nbdkit.read_password(value)


def test_the_channel_is_no_source_of_passwords() -> None:
    left, right = os.pipe()
    os.write(right, b"secret\n")
    with pytest.raises(ValueError, match="Bad file descriptor"):
        parse.read_password(f"-{left}", frozenset((left,)))
    os.close(left)
    os.close(right)


def test_errors_belong_to_their_thread(nbdkit: Any, server: module.Server) -> None:
    nbdkit.set_error(errno.ENOSPC)
    other = threading.Thread(target=nbdkit.set_error, args=(errno.EPERM,))
    other.start()
    other.join()
    assert server.thread.error == errno.ENOSPC


def test_export_name_and_tls_need_a_connection(nbdkit: Any, server: module.Server) -> None:
    assert nbdkit.export_name() == "name" and nbdkit.is_tls() is False
    assert nbdkit.peer_tls_dn() == "" and nbdkit.peer_tls_issuer_dn() == ""
    server.export_name = None
    for function in (nbdkit.export_name, nbdkit.is_tls, nbdkit.peer_tls_dn, nbdkit.peer_pid):
        with pytest.raises(RuntimeError):
            function()


def test_there_is_no_peer(nbdkit: Any) -> None:
    for name in ("pid", "uid", "gid", "security_context"):
        with pytest.raises(RuntimeError, match=f"^nbdkit.peer_{name} failed$"):
            getattr(nbdkit, f"peer_{name}")()
    assert nbdkit.stdio_safe() is False


@pytest.mark.timed
def test_sleep(nbdkit: Any, server: module.Server) -> None:
    begin = time.monotonic()
    nbdkit.nanosleep(0, 100_000_000)
    assert 0.1 <= time.monotonic() - begin < 1
    for seconds, nanoseconds in ((-1, 0), (0, -1), (1 << 31, 0)):
        with pytest.raises(RuntimeError):
            nbdkit.nanosleep(seconds, nanoseconds)
    threading.Timer(0.1, server.ending.set).start()
    with pytest.raises(RuntimeError):
        nbdkit.nanosleep(1000, 0)


def test_debug_follows_its_switch(
    nbdkit: Any, server: module.Server, capfd: pytest.CaptureFixture[str]
) -> None:
    nbdkit.debug("unseen")
    server.verbose = True
    nbdkit.debug("seen")
    assert capfd.readouterr().err == "script.py: debug: seen\n"
    with pytest.raises(TypeError):
        nbdkit.debug(5)


def test_everything_that_nbdkit_has(nbdkit: Any) -> None:
    """The names of nbdkit 1.42's module."""
    functions = {
        *("debug", "disconnect", "export_name", "is_tls", "nanosleep", "parse_delay", "parse_probability"),
        *("parse_size", "peer_pid", "peer_uid", "peer_gid", "peer_security_context", "peer_tls_dn"),
        *("peer_tls_issuer_dn", "read_password", "set_error", "shutdown", "stdio_safe"),
    }
    found = {name: value for name, value in vars(nbdkit).items() if not name.startswith("_")}
    assert {name for name in found if callable(found[name])} == functions
    assert {name: value for name, value in found.items() if not callable(value)} == {
        "THREAD_MODEL_SERIALIZE_CONNECTIONS": 0,
        "THREAD_MODEL_SERIALIZE_ALL_REQUESTS": 1,
        "THREAD_MODEL_SERIALIZE_REQUESTS": 2,
        "THREAD_MODEL_PARALLEL": 3,
        "FLAG_MAY_TRIM": 1,
        "FLAG_FUA": 2,
        "FLAG_REQ_ONE": 4,
        "FLAG_FAST_ZERO": 8,
        "FUA_NONE": 0,
        "FUA_EMULATE": 1,
        "FUA_NATIVE": 2,
        "CACHE_NONE": 0,
        "CACHE_EMULATE": 1,
        "CACHE_NATIVE": 2,
        "EXTENT_HOLE": 1,
        "EXTENT_ZERO": 2,
    }
