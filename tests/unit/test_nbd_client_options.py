# SPDX-License-Identifier: Apache-2.0
"""Options of the nbd driver: what they mean, what is refused and how, and URIs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from target.config.options import Notation, OptionError
from target.connecting import adopt, connect, describe
from target.drivers.protocol.nbd.options import NbdOptions, Place, parse_uri, place
from target.exports.address import FdAddress, InetAddress, UnixAddress, VsockAddress
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.registry import parse_blockdev

UNIX = {"type": "unix", "path": "/s"}


def parsed(**options: Any) -> NbdOptions:
    made = parse_blockdev({"driver": "nbd"} | {k.replace("_", "-"): v for k, v in options.items()}).options
    assert isinstance(made, NbdOptions)
    return made


def test_options_are_qemu_s() -> None:
    options = parsed(
        server=UNIX, export="disk", reconnect_delay=3, open_timeout=4, x_dirty_bitmap="qemu:dirty-bitmap:b"
    )
    assert place(options) == Place(UnixAddress("/s"), "disk")
    assert (options.reconnect_delay, options.open_timeout) == (3, 4)
    assert place(parsed(server=UNIX)).export == ""


@pytest.mark.parametrize(
    ("server", "address", "text"),
    [
        ({"type": "inet", "host": "h", "port": "1"}, InetAddress("h", "1"), "h:1"),
        ({"type": "inet", "host": "::1", "port": "1"}, InetAddress("::1", "1"), "[::1]:1"),
        ({"type": "vsock", "cid": "2", "port": "7"}, VsockAddress("2", "7"), "vsock:2:7"),
        ({"type": "fd", "str": "5"}, FdAddress("5"), "fd:5"),
        (UNIX, UnixAddress("/s"), "unix:/s"),
    ],
)
def test_addresses(server: dict[str, str], address: Any, text: str) -> None:
    found = place(parsed(server=server)).server
    assert found == address and describe(found) == text


def test_command_line_notation() -> None:
    value = {"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "reconnect-delay": "5"}
    made = parse_blockdev(value, Notation.KEYVAL).options
    assert isinstance(made, NbdOptions) and made.reconnect_delay == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "address missing"),
        ({"server": UNIX, "uri": "nbd://h"}, "'uri' and 'server'"),
        ({"export": "x", "uri": "nbd://h"}, "'uri' and 'export'"),
        ({"server": UNIX, "tls_creds": "t"}, "'tls-creds' is not supported"),
        ({"server": UNIX, "tls_hostname": "t"}, "'tls-hostname' is not supported"),
        ({"server": UNIX, "export": "x" * 4097}, "'export': longer than 4096"),
        ({"server": UNIX, "export": "a\0b"}, "'export' contains a null byte"),
        ({"server": UNIX, "x_dirty_bitmap": "é" * 2049}, "'x-dirty-bitmap': longer than 4096"),
        ({"server": UNIX, "export": "\ud800"}, "'export': not a text"),
    ],
)
async def test_refused_by_name(graph: Graph, options: dict[str, Any], words: str) -> None:
    given = {"driver": "nbd", "node-name": "n"} | {k.replace("_", "-"): v for k, v in options.items()}
    with pytest.raises(BlockError, match="node 'n'") as error:
        await graph.add(given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"connections": 17},
        {"reconnect-delay": -1},
        {"reconnect-delay": 1 << 32},
        {"open-timeout": "1"},
        {"server": {"type": "unix", "path": "/s", "abstract": True}},
        {"server": {"type": "inet", "host": "h"}},
        {"tls": True},
    ],
)
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        parse_blockdev({"driver": "nbd", "server": UNIX} | options)


@pytest.mark.parametrize(
    ("uri", "server", "export"),
    [
        ("nbd://example.com:10810/disk", InetAddress("example.com", "10810"), "disk"),
        ("nbd+tcp://example.com/disk", InetAddress("example.com", "10809"), "disk"),
        ("nbd://example.com", InetAddress("example.com", "10809"), ""),
        ("nbd://example.com/", InetAddress("example.com", "10809"), ""),
        ("nbd://example.com//disk", InetAddress("example.com", "10809"), "/disk"),
        ("nbd://example.com/hello%20world+x", InetAddress("example.com", "10809"), "hello world+x"),
        ("nbd://[::1]:1/%C3%A9", InetAddress("::1", "1"), "é"),
        ("nbd:///disk", InetAddress("localhost", "10809"), "disk"),
        ("NBD://h/d", InetAddress("h", "10809"), "d"),
        ("nbd+unix:///disk?socket=/tmp/a%20b", UnixAddress("/tmp/a b"), "disk"),
        ("nbd+unix://?socket=nbd.sock", UnixAddress("nbd.sock"), ""),
        ("nbd+unix:///?socket=%00/abstract", UnixAddress("\0/abstract"), ""),
        ("nbd+unix:///a%2Fb%3Fc?socket=s", UnixAddress("s"), "a/b?c"),
        ("nbd+vsock://3:99/d", VsockAddress("3", "99"), "d"),
        ("nbd+vsock:///d", VsockAddress("2", "10809"), "d"),
    ],
)
def test_uris(uri: str, server: Any, export: str) -> None:
    assert parse_uri(uri) == Place(server, export)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbds://h/d", "'nbds' is not supported: TLS"),
        ("nbds+unix:///d?socket=s", "'nbds+unix' is not supported: TLS"),
        ("nbds+vsock://2/d", "TLS"),
        ("nbd://h/d?tls-type=psk", "'tls-type' is not supported: TLS"),
        ("nbd://me@h/d", "user name"),
        ("nbd+unix:///d", "'socket' is missing"),
        ("nbd+unix:///d?socket=", "'socket' is missing"),
        ("nbd+unix://h/d?socket=s", "host has no meaning"),
        ("nbd+unix:///d?socket=a&socket=b", "twice"),
        ("nbd+unix:///d?socket=s&x=1", "unknown parameter 'x'"),
        ("nbd://h/d?socket=s", "belongs to nbd+unix"),
        ("nbd://h/d#f", "fragment"),
        ("nbd://h/d#", "fragment"),
        ("nbd://h:99999/d", "ort"),
        ("nbd://h:x/d", "ort"),
        ("nbd://[::1/d", "IPv6"),
        ("nbd://h/%zz", "percent-encoded"),
        ("nbd://h/a%2", "percent-encoded"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd+ssh://h/d", "must start with"),
        ("nbd:unix:/s", "must start with"),
        ("http://h/d", "must start with"),
        ("", "must start with"),
    ],
)
def test_wrong_uris(uri: str, words: str) -> None:
    with pytest.raises(BlockError) as error:
        parse_uri(uri)
    assert words in str(error.value) and f"'{uri}'" in str(error.value)


async def test_nobody_is_there(scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = str(made.getsockname()[1])
    for address, words in (
        (InetAddress("127.0.0.1", port), "Connection refused"),
        (UnixAddress(str(scratch / "no")), "No such file"),
        (UnixAddress("x" * 200), "too long"),
        (UnixAddress("a\0b"), "Failed to connect"),
        (UnixAddress(""), "'path'"),
        (VsockAddress("x", "1"), "'cid'"),
        (VsockAddress("2", "4294967296"), "'port'"),
        (InetAddress("x" * 70, "1"), "address resolution failed"),
    ):
        with pytest.raises(BlockError, match=words):
            await connect(address)


def test_descriptors() -> None:
    ours, theirs = socket.socketpair()
    made = adopt(str(ours.fileno()))
    ours.detach()
    assert made.getblocking() is False and not made.get_inheritable()
    made.close()
    theirs.close()
    with socket.create_server(("127.0.0.1", 0)) as listening, open("/dev/null") as file:
        for text, words in (
            ("x", "not a number"),
            (str(file.fileno()), "not a socket"),
            ("9999", "not a socket"),
            (str(listening.fileno()), "not a connected"),
        ):
            with pytest.raises(BlockError, match=words):
                adopt(text)
