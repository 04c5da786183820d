# SPDX-License-Identifier: Apache-2.0
"""Errors about the content of an image, before the node puts its name in front of them."""

from __future__ import annotations

import errno

from target.events import Event


class ImageError(ValueError):
    """The image cannot be opened, or not for writing; the text is for the user."""


class CorruptError(OSError):
    """Metadata that cannot be right was met while serving; requests that need it fail with EIO."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)
        self.message = message


class ImageCorrupted(Event):
    """Metadata cannot be right. ``fatal``: the image is marked corrupt, and not written any more.

    ``device`` is of guests' disks in QEMU, and empty here.
    """

    name = "BLOCK_IMAGE_CORRUPTED"
    device: str
    node_name: str
    msg: str
    fatal: bool
