# SPDX-License-Identifier: Apache-2.0
"""The commands, one module for each topic. Each command registers by being defined."""

from __future__ import annotations

from target.imports import import_children


def load() -> None:
    """Makes every command known."""
    import_children(__name__)
