# SPDX-License-Identifier: Apache-2.0
"""Imports all modules of a package, for registries that fill by definition. A failing module is an error."""

from __future__ import annotations

import importlib
import pkgutil


def import_children(package: str, depth: int = 1) -> None:
    """Imports the modules of a package, and those of its packages down to depth levels below it."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        name = f"{package}.{info.name}"
        importlib.import_module(name)
        if info.ispkg and depth > 1:
            import_children(name, depth - 1)
