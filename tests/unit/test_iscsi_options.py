# SPDX-License-Identifier: Apache-2.0
"""Options of an iscsi node: what is refused, and by which name; what a portal may look like."""

from __future__ import annotations

from typing import Any

import pytest

from target.config.options import Notation, parse
from target.drivers.protocol.iscsi.options import (
    IscsiOptions,
    OptionProblem,
    Portal,
    check,
    numeric,
    parse_portal,
)

GOOD = {"transport": "tcp", "portal": "127.0.0.1", "target": "iqn.2026-11.org.example:disk"}
CHAP = {"user": "us", "password-secret": "ours"}


def options(**changes: Any) -> IscsiOptions:
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return parse({**GOOD, **named}, IscsiOptions, Notation.JSON)


def test_defaults_are_those_of_qemu() -> None:
    made = options()
    check(made)
    assert (made.lun, made.timeout, made.sessions, made.header_digest) == (0, 0, 1, "none-crc32c")
    assert made.initiator_name is None and made.user is None
    assert made.data_digest == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transport": "iser"}, "option 'transport': 'iser' is not supported, only 'tcp'"),
        ({"portal": ""}, "option 'portal': expected 'host[:port]'"),
        ({"portal": ":3260"}, "option 'portal': expected 'host[:port]'"),
        ({"portal": "host:0"}, "option 'portal': invalid port '0'"),
        ({"portal": "host:65536"}, "option 'portal': invalid port '65536'"),
        ({"portal": "host:http"}, "option 'portal': invalid port 'http'"),
        ({"portal": "::1"}, "option 'portal': an IPv6 address stands in brackets"),
        ({"portal": "[::1"}, "option 'portal': missing ']'"),
        ({"portal": "[::1]3260"}, "option 'portal': missing ']'"),
        ({"target": ""}, "option 'target' is empty"),
        ({"target": "i" * 256}, "option 'target': expected up to 255 bytes"),
        ({"target": "é" * 128}, "option 'target': expected up to 255 bytes"),
        (
            {"initiator_name": "a" * 256},
            "option 'initiator-name': expected up to 255 bytes and none of them null",
        ),
        ({"lun": 16384}, "option 'lun': expected 0 to 16383, not 16384"),
        ({"sessions": 0}, "option 'sessions': expected 1 to 16, not 0"),
        ({"sessions": 17}, "option 'sessions': expected 1 to 16, not 17"),
        ({"timeout": 86401}, "option 'timeout'"),
        ({"reconnect_delay": 86401}, "option 'reconnect-delay'"),
        ({"user": "us"}, "option 'user' needs 'password-secret'"),
        ({"password_secret": "ours"}, "option 'password-secret' needs 'user'"),
        ({"mutual_user": "it", **CHAP}, "option 'mutual-user' needs 'mutual-password-secret'"),
        ({"mutual_user": "it", "mutual_password_secret": "its"}, "option 'mutual-user' needs 'user'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionProblem) as caught:
        check(options(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1", "127.0.0.1", 3260),
        ("storage.example.org:860", "storage.example.org", 860),
        ("127.0.0.1:3260,1", "127.0.0.1", 3260),
        ("[::1]", "::1", 3260),
        ("[fe80::1%eth0]:99", "fe80::1%eth0", 99),
    ],
)
def test_portals(text: str, host: str, port: int) -> None:
    assert parse_portal(text) == Portal(host, port)


def test_addresses_for_libiscsi() -> None:
    assert numeric("10.0.0.1", 3260) == "10.0.0.1:3260"
    assert numeric("::1", 3260) == "[::1]:3260"
