# SPDX-License-Identifier: Apache-2.0
"""A write of "shutdown" asks the server to end; that request is still done, and the plugin is closed."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def pwrite(h, buf, offset, flags):
    note("pwrite", len(buf), offset, flags)
    data[offset : offset + len(buf)] = buf
    if bytes(buf[:8]) == b"shutdown":
        nbdkit.shutdown()


def cleanup():
    note("cleanup")
