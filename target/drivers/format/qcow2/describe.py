# SPDX-License-Identifier: Apache-2.0
"""What queries show of an open image: its header, its snapshots, the backing file that it names."""

from __future__ import annotations

from typing import Literal

from target.drivers.format.qcow2 import spec
from target.drivers.format.qcow2.backing import backing_path
from target.drivers.format.qcow2.image import Image
from target.graph.describe import Description, ImageInfoSpecificQCow2, ImageInfoSpecificQCow2Wrapper


def describe(image: Image, overlay: str | None) -> Description:
    """``overlay``: the image's own path, where a relative name of the backing file starts."""
    header = image.header
    return Description(
        cluster_size=header.cluster_size,
        dirty=header.dirty and image.allocator is None,  # cleared when it was opened for writing
        backing_filename=header.backing_file,
        full_backing_filename=backing_path(header, overlay),
        backing_format=header.backing_format,
        snapshots=[snapshot.info for snapshot in image.snapshots],
        specific=ImageInfoSpecificQCow2Wrapper(data=_specific(image)),
    )


def _specific(image: Image) -> ImageInfoSpecificQCow2:
    header = image.header
    compression: Literal["zlib", "zstd"]
    compression = "zstd" if header.compression_type == spec.COMPRESSION_ZSTD else "zlib"
    if header.version < 3:
        return ImageInfoSpecificQCow2(
            compat="0.10", refcount_bits=header.refcount_bits, compression_type=compression
        )
    return ImageInfoSpecificQCow2(
        compat="1.1",
        lazy_refcounts=header.lazy_refcounts,
        refcount_bits=header.refcount_bits,
        corrupt=header.corrupt or image.broken,
        extended_l2=False,
        compression_type=compression,
    )
