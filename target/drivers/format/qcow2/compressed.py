# SPDX-License-Identifier: Apache-2.0
"""Reads compressed clusters: zlib (raw deflate) and zstd, with a cache of one decompressed cluster.

It writes none. zstd needs Python 3.14's compression.zstd, backports.zstd or zstandard.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import zlib
from collections.abc import Callable
from typing import Any

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.errors import CorruptError, ImageError
from target.drivers.format.qcow2.header import Header
from target.drivers.format.qcow2.store import Store
from target.drivers.format.qcow2.table import compressed_extent

Decompress = Callable[[bytes, int], bytes]  # (data, size of the result at most)

_INLINE = 128 << 10  # larger clusters are decompressed on a worker thread
_WINDOW_LOG = 25  # zstd frames that want more than 32 MiB of memory are refused


def inflate(data: bytes, size: int) -> bytes:
    """Raw deflate with a window of 12 bits, as the specification has it."""
    try:
        return zlib.decompressobj(-12).decompress(data, size)
    except zlib.error as error:
        raise CorruptError(f"a compressed cluster is damaged: {error}") from None


def _zstd() -> Decompress:
    for name, make in (
        ("compression.zstd", _standard_zstd),
        ("backports.zstd", _standard_zstd),
        ("zstandard", _zstandard),
    ):
        with contextlib.suppress(ImportError):
            return make(importlib.import_module(name))
    raise ImageError("compression type zstd needs one of the Python packages backports.zstd and zstandard")


def _standard_zstd(module: Any) -> Decompress:
    """Python 3.14's module, or its backport."""
    options = {module.DecompressionParameter.window_log_max: _WINDOW_LOG}

    def decompress(data: bytes, size: int) -> bytes:
        try:
            return bytes(module.ZstdDecompressor(options=options).decompress(data, max_length=size))
        except module.ZstdError as error:
            raise CorruptError(f"a compressed cluster is damaged: {error}") from None

    return decompress


def _zstandard(module: Any) -> Decompress:
    def decompress(data: bytes, size: int) -> bytes:
        try:
            reader = module.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).stream_reader(data)
            return bytes(reader.read(size))
        except module.ZstdError as error:
            raise CorruptError(f"a compressed cluster is damaged: {error}") from None

    return decompress


def decompressor(compression_type: int) -> Decompress:
    """The function for an image's compression_type. ImageError when it is not to be had here."""
    return inflate if compression_type == spec.COMPRESSION_ZLIB else _zstd()


class CompressedClusters:
    """Reads the compressed clusters of one image.

    The entry itself identifies a cluster's content: as none is written here, it never means another one.
    """

    def __init__(self, store: Store, header: Header) -> None:
        self.store = store
        self.header = header
        self._decompress = decompressor(header.compression_type)
        self._entry = 0
        self._data = b""

    async def read(self, raw: int) -> bytes:
        """The whole cluster that the L2 entry ``raw`` describes. CorruptError when it cannot be had."""
        if raw == self._entry:
            return self._data
        where = compressed_extent(raw, self.header.cluster_bits)
        if where.offset >= self.store.size:
            raise CorruptError(f"a compressed cluster lies past the end of the file ({where.offset:#x})")
        packed = await self.store.read(where.offset, where.length, "read_compressed")
        size = self.header.cluster_size
        if size > _INLINE:
            data = await asyncio.to_thread(self._decompress, packed, size)
        else:
            data = self._decompress(packed, size)
        if len(data) != size:
            raise CorruptError(f"a compressed cluster at {where.offset:#x} is too short ({len(data)} bytes)")
        self._entry, self._data = raw, data
        return data
