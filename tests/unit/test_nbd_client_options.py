# SPDX-License-Identifier: Apache-2.0
"""Options of the nbd driver: what they mean, what is refused and how, and URIs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from target.config.options import Notation, OptionError
from target.connecting import InetPeer, UnixPeer, adopt, connect, describe
from target.drivers.protocol.nbd.options import NbdOptions, Place, parse_uri, place
from target.exports.address import FdAddress, VsockAddress
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
    assert place(options) == Place(UnixPeer("/s"), "disk")
    assert (options.reconnect_delay, options.open_timeout) == (3, 4)
    assert place(parsed(server=UNIX)).export == ""


@pytest.mark.parametrize(
    ("server", "address", "text"),
    [
        ({"type": "inet", "host": "h", "port": "1"}, InetPeer("h", "1"), "h:1"),
        ({"type": "inet", "host": "::1", "port": "1"}, InetPeer("::1", "1"), "[::1]:1"),
        ({"type": "vsock", "cid": "2", "port": "7"}, VsockAddress("2", "7"), "vsock:2:7"),
        ({"type": "fd", "str": "5"}, FdAddress("5"), "fd:5"),
        (UNIX, UnixPeer("/s"), "unix:/s"),
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
        {"server": {"type": "unix", "path": "/s", "mode": 1}},
        {"server": {"type": "inet", "host": "h", "port": "1", "to": 5}},
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
        ("nbd://example.com:10810/disk", InetPeer("example.com", "10810"), "disk"),
        ("nbd+tcp://example.com/disk", InetPeer("example.com", "10809"), "disk"),
        ("nbd://example.com", InetPeer("example.com", "10809"), ""),
        ("nbd://example.com/", InetPeer("example.com", "10809"), ""),
        ("nbd://example.com//disk", InetPeer("example.com", "10809"), "/disk"),
        ("nbd://example.com/hello%20world+x", InetPeer("example.com", "10809"), "hello world+x"),
        ("nbd://[::1]:1/%C3%A9", InetPeer("::1", "1"), "é"),
        ("nbd:///disk", InetPeer("localhost", "10809"), "disk"),
        ("NBD://h/d", InetPeer("h", "10809"), "d"),
        ("nbd+unix:///disk?socket=/tmp/a%20b", UnixPeer("/tmp/a b"), "disk"),
        ("nbd+unix://?socket=nbd.sock", UnixPeer("nbd.sock"), ""),
        ("nbd+unix:///?socket=%00/abstract", UnixPeer("/abstract", abstract=True), ""),
        ("nbd+unix:///a%2Fb%3Fc?socket=s", UnixPeer("s"), "a/b?c"),
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
        ("nbd+unix:///d?socket=%00", "'socket' is missing"),
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
        (InetPeer("127.0.0.1", port), "Connection refused"),
        (UnixPeer(str(scratch / "no")), "No such file"),
        (UnixPeer("x" * 200), "too long"),
        (UnixPeer("a\0b"), "Failed to connect"),
        (UnixPeer(""), "'path'"),
        (VsockAddress("x", "1"), "'cid'"),
        (VsockAddress("2", "4294967296"), "'port'"),
        (InetPeer("x" * 70, "1"), "address resolution failed"),
        (InetPeer("localhost", port, numeric=True), "address resolution failed"),
        (InetPeer("127.0.0.1", port, ipv4=False), "address resolution failed"),
        (InetPeer("127.0.0.1", port, ipv4=False, ipv6=False), "Cannot disable IPv4 and IPv6"),
        (UnixPeer("nobody" * 3, abstract=True), "Connection refused"),
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
            ("x", "File descriptor named 'x' has not been found"),
            (str(file.fileno()), "not a socket"),
            ("9999", "not a socket"),
            (str(listening.fileno()), "not a connected"),
        ):
            with pytest.raises(BlockError, match=words):
                adopt(text)


@pytest.mark.parametrize("tight", [True, False])
async def test_abstract_names(tight: bool) -> None:
    name = f"bt-{os.getpid()}-{tight}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(("\0" + name) if tight else ("\0" + name).ljust(108, "\0"))
        listening.listen()
        (await connect(UnixPeer(name, abstract=True, tight=tight))).close()
        with pytest.raises(BlockError, match=r"unix:@bt-.*refused"):
            await connect(UnixPeer(name, abstract=True, tight=not tight))


async def test_keep_alive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        for on in (False, True):
            with await connect(InetPeer("127.0.0.1", port, keep_alive=on, ipv4=True)) as made:
                assert bool(made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is on
                assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("port", ["", "0", "-1", "65536", "99999", "1x", " 1", "\u0661"])
async def test_a_port_that_is_none_is_refused_and_not_taken_modulo_65536(port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = str(listener.getsockname()[1] + 65536) if port == "99999" else port
        with pytest.raises(BlockError, match="Parameter 'port' expects a number from 1 to 65535"):
            await connect(InetPeer("127.0.0.1", number))
