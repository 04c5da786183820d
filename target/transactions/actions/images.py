# SPDX-License-Identifier: Apache-2.0
"""Actions on image files."""

from __future__ import annotations

import os

from target.graph.node import Node
from target.graph.options import ImageOptions
from target.images import create_if_missing
from target.qmp.types import IMAGE_OPTIONS
from target.transactions.action import Action


class ImageCreate(Action, type="x-image-create"):
    """Makes an image where there is no file of that name, as ``images`` of a configuration file do."""

    Data = IMAGE_OPTIONS
    data: tuple[type[Node], ImageOptions]

    async def prepare(self) -> None:
        driver, options = self.data
        if not os.path.lexists(options.filename):
            await create_if_missing(driver, options)
            self.change.undo(lambda: os.unlink(options.filename))
