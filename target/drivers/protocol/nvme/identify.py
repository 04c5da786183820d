# SPDX-License-Identifier: Apache-2.0
"""What a controller and a namespace say about themselves, as far as it matters here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from target.drivers.protocol.nvme.errors import ControllerError
from target.drivers.protocol.nvme.spec import (
    COMMAND_SET_DESCRIPTOR,
    DESCRIPTOR,
    ERROR_ENTRY,
    ERROR_LOG_ENTRY,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    IDENTIFY_NVM,
    LBA_FORMAT,
    LBA_FORMATS,
    NVM_COMMAND_SET,
    PAGE,
    status_name,
    unpack,
)

BLOCK_SIZES = (512, 1024, 2048, 4096)
DISCARD_ONCS, ZEROES_ONCS = 1 << 2, 1 << 3
ZEROS_WHEN_DEALLOCATED, ZEROES_MAY_DEALLOCATE = 1, 1 << 3  # DLFEAT
WRITE_PROTECTED = 1  # NSATTR
SHUTDOWN_DEFAULT, SHUTDOWN_MAX = 10.0, 60.0  # seconds; the first for a controller that does not say


def text(data: bytes) -> str:
    """Printable, without the padding."""
    return "".join(c for c in data.decode("ascii", "replace").strip(" \0") if c.isprintable())


@dataclass(frozen=True)
class ControllerFacts:
    """Sizes in bytes, times in seconds; 0 where there is no limit."""

    model: str
    serial: str
    firmware: str
    version: str
    subsystem: str
    namespaces: int
    max_transfer: int
    aborts: int
    error_entries: int
    volatile_cache: bool
    discard: bool
    write_zeroes: bool
    namespace_notices: bool
    shutdown: float
    discard_ranges: int = 0
    discard_range_blocks: int = 0
    discard_blocks: int = 0
    zeroes_bytes: int = 0

    @classmethod
    def parse(cls, data: bytes, nvm: bytes) -> ControllerFacts:
        """``nvm``: what the controller says for its command set, or zeros."""
        fields, more = unpack(IDENTIFY_CONTROLLER, data), unpack(IDENTIFY_NVM, nvm)
        _check_entry_size("sqes", fields["sqes"], 6)
        _check_entry_size("cqes", fields["cqes"], 4)
        version = fields["ver"]
        return cls(
            model=text(fields["mn"]),
            serial=text(fields["sn"]),
            firmware=text(fields["fr"]),
            version=f"{version >> 16}.{version >> 8 & 0xFF}.{version & 0xFF}",
            subsystem=text(fields["subnqn"].partition(b"\0")[0]),
            namespaces=fields["nn"],
            max_transfer=_pages(fields["mdts"]),
            aborts=fields["acl"] + 1,
            error_entries=fields["elpe"] + 1,
            volatile_cache=bool(fields["vwc"] & 1),
            discard=bool(fields["oncs"] & DISCARD_ONCS),
            write_zeroes=bool(fields["oncs"] & ZEROES_ONCS),
            namespace_notices=bool(fields["oaes"] & 1 << 8),
            shutdown=min(fields["rtd3e"] / 1e6, SHUTDOWN_MAX) or SHUTDOWN_DEFAULT,
            discard_ranges=more["dmrl"],
            discard_range_blocks=more["dmrsl"],
            discard_blocks=more["dmsl"],
            zeroes_bytes=_pages(more["wzsl"]),
        )


def _check_entry_size(name: str, value: int, wanted: int) -> None:
    """The lower half is what the controller requires, the upper what it can at most; 0 in old emulations."""
    if value and not value & 15 <= wanted <= value >> 4:
        raise ControllerError(
            f"queue entries of {1 << wanted} bytes are not supported ({name.upper()} {value:#x})"
        )


def _pages(exponent: int) -> int:
    """Bytes of a limit in units of a power of two of pages; 0: none."""
    return PAGE << exponent if 0 < exponent < 48 else 0


@dataclass(frozen=True)
class NamespaceFacts:
    """Sizes in bytes."""

    identifier: int
    size: int
    block_size: int
    zeros_when_deallocated: bool
    zeroes_may_deallocate: bool
    write_protected: bool
    nguid: str
    eui64: str

    @classmethod
    def parse(cls, identifier: int, data: bytes) -> NamespaceFacts:
        """ControllerError for a namespace that is not there, or whose format is not supported."""
        fields = unpack(IDENTIFY_NAMESPACE, data)
        if not fields["nsze"]:
            raise ControllerError(f"namespace {identifier} does not exist or is not active")
        block_size = _block_size(identifier, fields, data)
        size = fields["nsze"] * block_size
        if size >= 1 << 63:
            raise ControllerError(
                f"namespace {identifier} claims {fields['nsze']} blocks of {block_size} bytes"
            )
        dlfeat = fields["dlfeat"]
        return cls(
            identifier=identifier,
            size=size,
            block_size=block_size,
            zeros_when_deallocated=dlfeat & 7 == ZEROS_WHEN_DEALLOCATED,
            zeroes_may_deallocate=bool(dlfeat & ZEROES_MAY_DEALLOCATE),
            write_protected=bool(fields["nsattr"] & WRITE_PROTECTED),
            nguid=fields["nguid"].hex(),
            eui64=fields["eui64"].hex(),
        )


def command_set(descriptors: bytes) -> int:
    """The command set that a namespace says it is of; that of NVM when it says nothing."""
    at = 0
    while at + DESCRIPTOR.size < len(descriptors):
        kind, length = DESCRIPTOR.unpack_from(descriptors, at)
        at += DESCRIPTOR.size
        if not length:
            break
        if kind == COMMAND_SET_DESCRIPTOR:
            return descriptors[at]
        at += length
    return NVM_COMMAND_SET


def _block_size(identifier: int, fields: dict[str, Any], data: bytes) -> int:
    index = fields["flbas"] & 15 | (fields["flbas"] >> 5 & 3) << 4
    if index > fields["nlbaf"] and index > 15:
        raise ControllerError(f"namespace {identifier} has no LBA format {index}")
    metadata: int
    shift: int
    metadata, shift, _ = LBA_FORMAT.unpack_from(data, LBA_FORMATS + index * LBA_FORMAT.size)
    if metadata:
        raise ControllerError(
            f"namespace {identifier} is formatted with {metadata} bytes of metadata for each block, "
            "which is not supported"
        )
    if 1 << shift not in BLOCK_SIZES:
        raise ControllerError(f"namespace {identifier} has blocks of 2^{shift} bytes, which is not supported")
    return 1 << shift


@dataclass(frozen=True)
class LoggedError:
    """One entry of the error log."""

    count: int
    queue: int
    command: int
    status: int
    lba: int
    namespace: int

    def __str__(self) -> str:
        where = "" if self.lba == (1 << 64) - 1 else f", LBA {self.lba}"
        return f"error {self.count}: {status_name(self.status)}, queue {self.queue}{where}"


def parse_error_log(data: bytes) -> list[LoggedError]:
    """The entries that are in use, newest first."""
    errors = []
    for at in range(0, len(data) - ERROR_ENTRY + 1, ERROR_ENTRY):
        fields = unpack(ERROR_LOG_ENTRY, data[at : at + ERROR_ENTRY])
        if fields["error_count"]:
            errors.append(
                LoggedError(
                    fields["error_count"],
                    fields["sqid"],
                    fields["cid"],
                    fields["status"] >> 1 & 0x7FF,
                    fields["lba"],
                    fields["nsid"],
                )
            )
    return errors
