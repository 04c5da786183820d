# SPDX-License-Identifier: Apache-2.0
"""Makes image files, by the drivers' own code."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.graph.node import Node
    from target.graph.options import ImageOptions


async def create_if_missing(driver: type[Node], options: ImageOptions) -> None:
    """Makes the image, complete or not at all. Does nothing when a file of that name exists. BlockError."""
    if os.path.lexists(options.filename):
        return
    part = f"{options.filename}.{os.getpid()}.part"
    try:
        await driver.create(msgspec.structs.replace(options, filename=part))
        # A link, unlike a rename, does not replace an image that another process has made meanwhile.
        with contextlib.suppress(FileExistsError):
            os.link(part, options.filename)
    except OSError as error:
        raise BlockError.from_os(f"image '{options.filename}': Could not create", error) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
