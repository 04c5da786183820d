# SPDX-License-Identifier: Apache-2.0
"""How an interpreter, which may not know this package, is started on a plugin."""

from __future__ import annotations

from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
# What it imports of the package leaves no trace; nbdkit's interpreter has no working directory on its path.
BOOT = (
    "import sys; sys.version_info >= (3, 9) or sys.exit('Python 3.9 or later is needed'); "
    f"sys.path.insert(0, {ROOT!r}); from target.nbdkit import MODULE as it; del sys.path[0]; "
    "sys.path[:1] = [p for p in sys.path[:1] if p]; it.main()"
)


def command(python: str, module: str, *arguments: str) -> list[str]:
    """Runs ``main`` of a module of this package."""
    return [python, "-u", "-c", BOOT.replace("MODULE", module), *arguments]
