# SPDX-License-Identifier: Apache-2.0
"""Makes image files, by the drivers' own code."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

import msgspec

from target.drivers import locking
from target.graph import registry
from target.graph.describe import filename
from target.graph.errors import BlockError
from target.graph.permissions import Perm

if TYPE_CHECKING:
    from target.graph.change import Change
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


async def create_overlay(change: Change, format: str, path: str, node: Node) -> None:
    """Makes an empty image at path, whose backing file is what the node was opened from.

    A part of a change: a regular file that is there is replaced, and is back when it is undone. Through a
    symbolic link it is the file that the link names. BlockError.
    """
    path = os.path.realpath(path)
    kind = registry.image_options().get(format)
    if kind is None or not hasattr(kind, "backing_file"):
        raise BlockError(f"Backing file not supported for file format '{format}'")
    name = filename(node)
    if not name.startswith("json:") and "://" not in name:
        name = os.path.abspath(name)  # the overlay may lie in another directory
    options: dict[str, Any] = {
        "filename": path,
        "size": node.size,
        "backing_file": name,
        "backing_fmt": node.driver,
    }
    try:
        before = _put_aside(change, path)
    except OSError as error:
        raise BlockError.from_os(f"Could not create '{path}'", error) from None
    change.undo(lambda: _remove(path))
    await create_if_missing(registry.driver(format), kind(**options))
    if before is not None:
        shutil.copymode(before, path)


def _put_aside(change: Change, path: str) -> str | None:
    """Gives a file another name until the change is made or undone; returns it. None: there is no file."""
    if not os.path.lexists(path):
        return None
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise BlockError(f"Could not create '{path}': it exists and is no regular file")
    _refuse_in_use(change, path)
    aside = f"{path}.{os.getpid()}.replaced"
    os.rename(path, aside)
    change.undo(lambda: os.rename(aside, path))
    change.later(lambda: _remove(aside))
    return aside


def _refuse_in_use(change: Change, path: str) -> None:
    """BlockError when another program or a node uses the file, which may be the very node's image."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if locking.supported(fd):
            locking.ImageLock(fd, path).prepare(Perm.WRITE | Perm.RESIZE, Perm.ALL)
    finally:
        os.close(fd)  # and the locks with it
    found = os.stat(path)
    for node in change.graph.nodes.values():  # which may have locking=off
        if node.storage == (found.st_dev, found.st_ino):
            raise BlockError(f"Could not create '{path}': {node.label} uses the file")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
