# SPDX-License-Identifier: Apache-2.0
"""Exports, one package for each type. ``load`` imports them all, which registers them."""

from __future__ import annotations

from target.imports import import_children


def load() -> None:
    """Makes every export type known."""
    import_children(__name__)
