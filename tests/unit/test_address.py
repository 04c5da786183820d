# SPDX-License-Identifier: Apache-2.0
"""Listening on addresses as options give them."""

from __future__ import annotations

import os
import socket

import pytest

from target.exports.address import FdAddress, InetAddress, UnixAddress, listen
from target.fdsets import Descriptors
from target.graph.errors import BlockError


async def test_abstract_names() -> None:
    (listener,) = await listen(UnixAddress("bt-abstract", abstract=True))
    assert listener.socket.getsockname() == b"\0bt-abstract"
    assert not os.path.exists("bt-abstract")
    listener.close()
    (listener,) = await listen(UnixAddress("bt-abstract", abstract=True, tight=False))
    assert listener.socket.getsockname() == b"\0bt-abstract".ljust(108, b"\0")
    listener.close()


async def test_families() -> None:
    listeners = await listen(InetAddress("", "0", ipv4=True))
    assert [listener.socket.family for listener in listeners] == [socket.AF_INET]
    for listener in listeners:
        listener.close()


async def test_the_next_free_port() -> None:
    (first,) = await listen(InetAddress("127.0.0.1", "0"))
    port = first.socket.getsockname()[1]
    (second,) = await listen(InetAddress("127.0.0.1", str(port), to=min(port + 50, 65535)))
    assert second.socket.getsockname()[1] > port
    with pytest.raises(BlockError, match="Address already in use"):
        await listen(InetAddress("127.0.0.1", str(port)))
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipv4": False, "ipv6": False}, "Cannot disable IPv4 and IPv6 at same time"),
        ({"keep_alive": True}, "keep-alive option is not supported for passive sockets"),
        ({"to": 5}, "Parameter 'to' expects a number from 10 to 65535, not '5'"),
        ({"to": 70000}, "Parameter 'to' expects a number from 10 to 65535, not '70000'"),
        ({"numeric": True}, "address resolution failed for localhost:10"),
    ],
)
async def test_mistakes(options: dict[str, bool | int], message: str) -> None:
    with pytest.raises(BlockError, match=message):
        await listen(InetAddress("localhost", "10", **options))  # type: ignore[arg-type]


async def test_a_name_is_used_up_whatever_comes_of_it() -> None:
    descriptors = Descriptors()
    reader, writer = os.pipe()
    descriptors.name("pipe", reader)
    with pytest.raises(BlockError, match="File descriptor 'pipe' is not a socket"):
        await listen(FdAddress("pipe"), descriptors)
    assert not descriptors.named
    with pytest.raises(OSError):
        os.fstat(reader)
    os.close(writer)
