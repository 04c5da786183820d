# SPDX-License-Identifier: Apache-2.0
"""The driver's options, named as in QMP's BlockdevOptionsQcow2 and BlockdevCreateOptionsQcow2, and checks.

What is not built is refused by name here, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET, UnsetType

from target.config.options import Refused, Size, Unsigned
from target.drivers.format.qcow2.errors import ImageError
from target.drivers.format.qcow2.header import Header
from target.graph.node import BlockdevRef, ImageOptions, NodeOptions

DEFAULT_L2_CACHE = 32 << 20
DEFAULT_REFCOUNT_CACHE = 1 << 20
_SLICE_BITS = 12
_MAX_SLICE_BITS = 18
_MAX_SLICES = 4 << 20


class Qcow2Options(NodeOptions):
    """``pass-discard-snapshot`` matters only when a snapshot is deleted, which does not happen here, and
    ``lazy-refcounts`` only permits what this driver does not do (it keeps counts exact): either value of them
    describes what is done."""

    file: BlockdevRef
    backing: BlockdevRef | UnsetType | None = UNSET
    lazy_refcounts: bool | UnsetType = UNSET
    pass_discard_request: bool | UnsetType = UNSET
    pass_discard_snapshot: bool | UnsetType = UNSET
    pass_discard_other: bool | UnsetType = UNSET
    discard_no_unref: bool = False
    overlap_check: Literal["none", "constant", "cached", "all"] = "cached"
    cache_size: Size | UnsetType = UNSET
    l2_cache_size: Size | UnsetType = UNSET
    l2_cache_entry_size: Size | UnsetType = UNSET
    refcount_cache_size: Size | UnsetType = UNSET
    cache_clean_interval: Unsigned = 0
    encrypt: Refused = None
    data_file: Refused = None


class Qcow2CreateOptions(ImageOptions):
    version: Literal["v2", "v3"] = "v3"
    cluster_size: Size = 65536
    backing_file: str | None = None
    backing_fmt: str | None = None
    lazy_refcounts: bool = False
    refcount_bits: Unsigned = 16
    preallocation: Literal["off"] = "off"


# What a reopen may change.
REOPENABLE = frozenset(
    {
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "l2-cache-entry-size",
        "refcount-cache-size",
    }
)
# What does not decide which data the image has.
TUNING = frozenset(Qcow2Options.__struct_fields__) - {"file", "backing", "encrypt", "data_file"}


@dataclass(frozen=True)
class Caches:
    """Sizes in bytes; ``slice_bits``: log2 of the entries that are loaded at once."""

    l2: int
    refcount: int
    slice_bits: int


def check_options(options: Qcow2Options, header: Header) -> None:
    """ImageError names an option that this driver, or this image, does not support."""
    if options.lazy_refcounts is True and header.version < 3:
        raise ImageError("option 'lazy-refcounts': lazy reference counts need a version 3 image")
    for name, given in (
        ("discard-no-unref", options.discard_no_unref),
        ("cache-clean-interval", bool(options.cache_clean_interval)),
        ("encrypt", options.encrypt is not None),
        ("data-file", options.data_file is not None),
    ):
        if given:
            raise ImageError(f"option '{name}' is not supported")
    if options.overlap_check == "all":
        raise ImageError("option 'overlap-check': 'all' is not supported, only none, constant and cached")


def caches(options: Qcow2Options, header: Header) -> Caches:
    """Cache sizes by QEMU's rules for cache-size, l2-cache-size and refcount-cache-size. ImageError."""
    slice_bits = _slice_bits(options, header)
    l2, refcount = _split(options)
    entries = -(-header.size >> header.cluster_bits)
    # Never more than the image needs; a slice at the least.
    needed = (-(-entries >> slice_bits)) * _slice_memory(slice_bits)
    return Caches(max(min(l2, needed), _slice_memory(slice_bits)), refcount, slice_bits)


def _slice_memory(slice_bits: int) -> int:
    return (8 << slice_bits) + 64


def _split(options: Qcow2Options) -> tuple[int, int]:
    total, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if total is UNSET:
        return (
            DEFAULT_L2_CACHE if l2 is UNSET else l2,
            DEFAULT_REFCOUNT_CACHE if refcount is UNSET else refcount,
        )
    if l2 is not UNSET and refcount is not UNSET:
        raise ImageError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
    for name, part in (("l2-cache-size", l2), ("refcount-cache-size", refcount)):
        if part is not UNSET and part > total:
            raise ImageError(f"{name} may not exceed cache-size")
    if l2 is not UNSET:
        return l2, total - l2
    if refcount is not UNSET:
        return total - refcount, refcount
    refcount = min(DEFAULT_REFCOUNT_CACHE, total // 4)
    return total - refcount, refcount


def _slice_bits(options: Qcow2Options, header: Header) -> int:
    size = options.l2_cache_entry_size
    if size is not UNSET:
        if size < 512 or size > header.cluster_size or size & size - 1:
            raise ImageError(
                f"option 'l2-cache-entry-size' ({size}): L2 cache entry size must be a power of two"
                f" between 512 and the cluster size ({header.cluster_size})"
            )
        bits = size.bit_length() - 4
    else:
        bits = min(_SLICE_BITS, header.l2_bits)
    clusters = -(-header.size >> header.cluster_bits)
    while -(-clusters >> bits) > _MAX_SLICES and bits < min(header.l2_bits, _MAX_SLICE_BITS):
        bits += 1
    return bits
