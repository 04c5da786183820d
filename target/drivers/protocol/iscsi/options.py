# SPDX-License-Identifier: Apache-2.0
"""The options of an iscsi node, checked, and where its portal is."""

from __future__ import annotations

from typing import Literal, NamedTuple

from target.config.options import Unsigned
from target.graph.node import NodeOptions

DEFAULT_PORT = 3260
STRING_MAX = 255  # bytes, of what goes into libiscsi
SESSIONS_MAX = 16
LUN_MAX = 16383  # flat space addressing, SAM-5 4.7.5
SECONDS_MAX = 86400

Digest = Literal["crc32c", "none", "crc32c-none", "none-crc32c"]


class IscsiOptions(NodeOptions):
    """QEMU's BlockdevOptionsIscsi, and from ``data-digest`` on ours."""

    transport: Literal["tcp", "iser"]
    portal: str
    target: str
    lun: Unsigned = 0
    user: str | None = None
    password_secret: str | None = None
    initiator_name: str | None = None
    header_digest: Digest = "none-crc32c"
    timeout: Unsigned = 0
    data_digest: Digest = "none"
    mutual_user: str | None = None
    mutual_password_secret: str | None = None
    sessions: Unsigned = 1
    reconnect_delay: Unsigned = 120


class OptionProblem(ValueError):
    """What is wrong with an option, for a message that names the node."""


class Portal(NamedTuple):
    host: str
    port: int


def parse_portal(text: str) -> Portal:
    """``host[:port][,group]``, an IPv6 address in brackets."""
    address, _, _group = text.partition(",")
    host, port = _split(address)
    if not host:
        raise OptionProblem(f"option 'portal': expected 'host[:port]', not '{text}'")
    if not port:
        return Portal(host, DEFAULT_PORT)
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise OptionProblem(f"option 'portal': invalid port '{port}'")
    return Portal(host, int(port))


def _split(address: str) -> tuple[str, str]:
    if address.startswith("["):
        host, closed, rest = address[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise OptionProblem(f"option 'portal': missing ']' in '{address}'")
        return host, rest[1:]
    if address.count(":") > 1:
        raise OptionProblem(f"option 'portal': an IPv6 address stands in brackets: '{address}'")
    host, _, port = address.partition(":")
    return host, port


def numeric(host: str, port: int) -> str:
    """As libiscsi takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check(options: IscsiOptions) -> None:
    """Refuses what cannot be honoured. OptionProblem."""
    if options.transport == "iser":
        raise OptionProblem("option 'transport': 'iser' is not supported, only 'tcp'")
    parse_portal(options.portal)
    _check_strings(options)
    _check_numbers(options)
    _check_chap(options)


def _check_strings(options: IscsiOptions) -> None:
    for name in ("portal", "target", "user", "initiator_name", "mutual_user"):
        value = getattr(options, name)
        if value is None:
            continue
        option = name.replace("_", "-")
        if not value:
            raise OptionProblem(f"option '{option}' is empty")
        if "\0" in value or len(value.encode()) > STRING_MAX:
            raise OptionProblem(f"option '{option}': expected up to {STRING_MAX} bytes and none of them null")


def _check_numbers(options: IscsiOptions) -> None:
    for name, low, high in (
        ("lun", 0, LUN_MAX),
        ("sessions", 1, SESSIONS_MAX),
        ("timeout", 0, SECONDS_MAX),
        ("reconnect_delay", 0, SECONDS_MAX),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            option = name.replace("_", "-")
            raise OptionProblem(f"option '{option}': expected {low} to {high}, not {value}")


def _check_chap(options: IscsiOptions) -> None:
    for user, secret in (("user", "password_secret"), ("mutual_user", "mutual_password_secret")):
        names = [name.replace("_", "-") for name in (user, secret)]
        given = [getattr(options, name) is not None for name in (user, secret)]
        if given == [True, False]:
            raise OptionProblem(f"option '{names[0]}' needs '{names[1]}'")
        if given == [False, True]:
            raise OptionProblem(f"option '{names[1]}' needs '{names[0]}'")
    if options.mutual_user is not None and options.user is None:
        raise OptionProblem("option 'mutual-user' needs 'user': a target proves itself to who does so")
