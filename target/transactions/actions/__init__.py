# SPDX-License-Identifier: Apache-2.0
"""The actions, one module for each topic."""

from __future__ import annotations

from target.imports import import_children


def load() -> None:
    """Makes every action known."""
    import_children(__name__)
