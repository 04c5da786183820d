# SPDX-License-Identifier: Apache-2.0
"""Block drivers: protocol (where bytes lie), format (what they mean), filter. One module or package for each.

A package registers its driver by importing it in its ``__init__``.
"""

from __future__ import annotations

from target.imports import import_children


def load() -> None:
    """Makes every driver known."""
    import_children(__name__, depth=2)
