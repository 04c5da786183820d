# SPDX-License-Identifier: Apache-2.0
"""get_size returns size=EXPRESSION."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


class Index:
    def __index__(self):
        return 4096


def get_size(h):
    return eval(parameters["size"])


def pread(h, buf, offset, flags):
    buf[:] = b"s" * len(buf)
