# SPDX-License-Identifier: Apache-2.0
"""Version 1 by default: other signatures. notes the arguments."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *


def pread(h, count, offset):
    note("pread", count, offset)
    return data[offset : offset + count]


def pwrite(h, buf, offset):
    note("pwrite", type(buf).__name__, len(buf), offset)
    data[offset : offset + len(buf)] = buf


def flush(h):
    note("flush")


def trim(h, count, offset):
    note("trim", count, offset)
    data[offset : offset + count] = b"t" * count


def zero(h, count, offset, may_trim):
    note("zero", count, offset, may_trim)
    data[offset : offset + count] = bytes(count)
