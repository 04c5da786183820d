# SPDX-License-Identifier: Apache-2.0
"""The error that a user of the graph can cause. What is a bug stays a Python exception of another kind."""

from __future__ import annotations

import os


class BlockError(Exception):
    """One line for the user, naming the node or export, the option and the value where there are any."""

    @classmethod
    def from_os(cls, what: str, error: OSError) -> BlockError:
        """``what``: "Could not open 'x'"; the reason is added as the C library words it."""
        return cls(f"{what}: {os.strerror(error.errno) if error.errno else error}")
