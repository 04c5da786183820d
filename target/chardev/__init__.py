# SPDX-License-Identifier: Apache-2.0
"""Character devices: where the bytes of monitors come from and go to. One module for each kind of backend."""

from __future__ import annotations

from target.imports import import_children


def load() -> None:
    """Makes every backend known."""
    import_children(__name__)
