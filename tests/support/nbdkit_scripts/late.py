# SPDX-License-Identifier: Apache-2.0
"""Callbacks are looked up at every call: a write replaces pread, a flush takes pwrite away."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def pwrite(h, buf, offset, flags):
    def new_pread(h, buf, offset, flags):
        buf[:] = b"N" * len(buf)

    globals()["pread"] = new_pread


def flush(h, flags):
    globals()["pwrite"] = None
