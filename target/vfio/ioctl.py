# SPDX-License-Identifier: Apache-2.0
"""The numbers and structures of linux/vfio.h, and calls that fill one in.

Structures are bytearrays: the kernel's answer to one of bytes would be lost.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag

# _IO(';', 100 + n)
_BASE = ord(";") << 8 | 100


class Call(IntEnum):
    GET_API_VERSION = _BASE + 0
    CHECK_EXTENSION = _BASE + 1
    SET_IOMMU = _BASE + 2
    GROUP_GET_STATUS = _BASE + 3
    GROUP_SET_CONTAINER = _BASE + 4
    GROUP_UNSET_CONTAINER = _BASE + 5
    GROUP_GET_DEVICE_FD = _BASE + 6
    DEVICE_GET_INFO = _BASE + 7
    DEVICE_GET_REGION_INFO = _BASE + 8
    DEVICE_GET_IRQ_INFO = _BASE + 9
    DEVICE_SET_IRQS = _BASE + 10
    DEVICE_RESET = _BASE + 11
    IOMMU_GET_INFO = _BASE + 12


API_VERSION = 0
TYPE1V2_IOMMU = 3


class GroupFlag(IntFlag):
    VIABLE = 1
    CONTAINER_SET = 2


class DeviceFlag(IntFlag):
    RESET = 1
    PCI = 2


class RegionFlag(IntFlag):
    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlag(IntFlag):
    EVENTFD = 1
    DATA_NONE = 1
    DATA_EVENTFD = 4
    ACTION_TRIGGER = 32


class Region(IntEnum):
    BAR0 = 0
    CONFIG = 7


class Irq(IntEnum):
    INTX = 0
    MSI = 1
    MSIX = 2


class IommuFlag(IntFlag):
    PGSIZES = 1
    CAPS = 2


class Capability(IntEnum):
    """Of regions, and of a type 1 IOMMU."""

    SPARSE_MMAP = 1
    IOVA_RANGE = 1
    DMA_AVAIL = 3


GROUP_STATUS = struct.Struct("=II")  # argsz, flags
DEVICE_INFO = struct.Struct("=IIIIII")  # argsz, flags, num_regions, num_irqs, cap_offset, pad
REGION_INFO = struct.Struct("=IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
IRQ_INFO = struct.Struct("=IIII")  # argsz, flags, index, count
IRQ_SET = struct.Struct("=IIIII")  # argsz, flags, index, start, count; then the descriptors
IOMMU_INFO = struct.Struct("=IIQII")  # argsz, flags, iova_pgsizes, cap_offset, pad
CAPABILITY = struct.Struct("=HHI")  # id, version, offset of the next
RANGES = struct.Struct("=II")  # nr_iovas, or nr_areas; reserved
RANGE = struct.Struct("=QQ")  # first and last iova; or offset and size of an area
AVAILABLE = struct.Struct("=I")


def query(fd: int, call: Call, layout: struct.Struct, *head: int) -> bytearray:
    """The kernel's answer in a structure that begins with argsz: ``head`` are the fields after it.

    A longer answer (capabilities) is asked for again with room. OSError.
    """
    answer = _filled(layout, layout.size, head)
    fcntl.ioctl(fd, call, answer)
    (wanted,) = struct.unpack_from("=I", answer)
    if wanted > layout.size:
        answer = _filled(layout, wanted, head)
        fcntl.ioctl(fd, call, answer)
    return answer


def _filled(layout: struct.Struct, size: int, head: tuple[int, ...]) -> bytearray:
    answer = bytearray(max(size, layout.size))
    struct.pack_into(f"={1 + len(head)}I", answer, 0, len(answer), *head)
    return answer


def capabilities(answer: bytearray, first: int) -> Iterator[tuple[int, int]]:
    """Identifier and offset of the content of each capability in the list that begins at ``first``."""
    seen: set[int] = set()
    while first and first not in seen and first + CAPABILITY.size <= len(answer):
        seen.add(first)
        identifier, _, following = CAPABILITY.unpack_from(answer, first)
        yield identifier, first + CAPABILITY.size
        first = following
