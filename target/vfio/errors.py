# SPDX-License-Identifier: Apache-2.0
"""What a user can cause: a device that cannot be had."""

from __future__ import annotations

import os


class VfioError(Exception):
    """One line for the user: which device, what is wrong with it, what to do."""

    @classmethod
    def from_os(cls, what: str, error: OSError) -> VfioError:
        return cls(f"{what}: {os.strerror(error.errno) if error.errno else error}")
