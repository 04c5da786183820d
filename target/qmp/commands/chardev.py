# SPDX-License-Identifier: Apache-2.0
"""Commands about character devices (QEMU's char.json)."""

from __future__ import annotations

import base64
import re
from typing import Literal

from target.chardev import base
from target.chardev.command_line import ChardevRequest
from target.chardev.memory import Ringbuf
from target.chardev.options import ChardevBackend
from target.chardev.posix import Pty
from target.graph.errors import BlockError
from target.qmp.registry import Answer, Arguments, Context, command

BASE64 = re.compile(r"[A-Za-z0-9+/]*\Z")

DataFormat = Literal["utf8", "base64"]


class IdArguments(Arguments):
    id: str


class BackendArguments(Arguments):
    id: str
    backend: ChardevBackend


class WriteArguments(Arguments):
    device: str
    data: str
    format: DataFormat = "utf8"


class ReadArguments(Arguments):
    device: str
    size: int
    format: DataFormat = "utf8"


class ChardevInfo(Answer):
    label: str
    filename: str
    frontend_open: bool


class ChardevBackendInfo(Answer):
    name: str


class ChardevReturn(Answer):
    """``pty``: the name of the terminal that was made."""

    pty: str | None = None


@command("query-chardev", returns=list[ChardevInfo])
async def query_chardev(context: Context, given: None) -> list[ChardevInfo]:
    return [
        ChardevInfo(label=id, filename=device.filename, frontend_open=device.front is not None)
        for id, device in context.service.chardevs.items()
    ]


@command("query-chardev-backends", returns=list[ChardevBackendInfo])
async def query_chardev_backends(context: Context, given: None) -> list[ChardevBackendInfo]:
    return [ChardevBackendInfo(name=name) for name in base.types()]


@command("chardev-add", BackendArguments, returns=ChardevReturn)
async def chardev_add(context: Context, given: BackendArguments) -> ChardevReturn:
    return await _add(context, given)


async def _add(context: Context, given: BackendArguments) -> ChardevReturn:
    kind = str(given.backend.__struct_config__.tag)
    request = ChardevRequest(given.id, kind, given.backend.data)
    device = await context.service.add_chardev(request)
    return ChardevReturn(pty=device.name if isinstance(device, Pty) else None)


@command("chardev-change", BackendArguments, returns=ChardevReturn)
async def chardev_change(context: Context, given: BackendArguments) -> ChardevReturn:
    """Replaces a device that nothing uses. As in QEMU the old one is gone when the new one cannot be had."""
    device = context.service.chardevs.get(given.id)
    if device is None:
        raise BlockError(f"Chardev '{given.id}' does not exist")
    if device.front is not None:
        raise BlockError("Chardev user does not support chardev hotswap")
    await context.service.remove_chardev(given.id)
    return await _add(context, given)


@command("chardev-remove", IdArguments)
async def chardev_remove(context: Context, given: IdArguments) -> None:
    await context.service.remove_chardev(given.id)


@command("chardev-send-break", IdArguments)
async def chardev_send_break(context: Context, given: IdArguments) -> None:
    """No device here has a line that could break. QEMU accepts the command for such devices, too."""
    if given.id not in context.service.chardevs:
        raise BlockError(f"Chardev '{given.id}' not found")


@command("ringbuf-write", WriteArguments)
async def ringbuf_write(context: Context, given: WriteArguments) -> None:
    _ringbuf(context, given.device).write(_decode(given.data, given.format))


@command("ringbuf-read", ReadArguments, returns=str)
async def ringbuf_read(context: Context, given: ReadArguments) -> str:
    ring = _ringbuf(context, given.device)
    if given.size <= 0:
        raise BlockError("size must be greater than zero")
    data = ring.read(given.size)
    return base64.b64encode(data).decode() if given.format == "base64" else data.decode(errors="replace")


def _ringbuf(context: Context, id: str) -> Ringbuf:
    device = context.service.chardevs.get(id)
    if device is None:
        raise BlockError(f"Device '{id}' not found")
    if not isinstance(device, Ringbuf):
        raise BlockError(f"{id} is not a ringbuf device")
    return device


def _decode(data: str, format: DataFormat) -> bytes:
    if format == "utf8":
        return data.encode()
    plain = data.replace("\n", "").replace("\r", "").rstrip("=")
    if not BASE64.match(plain):
        raise BlockError("Base64 data contains invalid characters")
    complete = plain[: len(plain) - (len(plain) % 4 == 1)]  # as QEMU, which takes data without padding
    return base64.b64decode(complete + "=" * (-len(complete) % 4))
