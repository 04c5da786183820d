# SPDX-License-Identifier: Apache-2.0
"""State of the module and of the handle lives from call to call: each read of sector 0 counts."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


class Handle:
    def __init__(self):
        self.reads = 0


def open(readonly):
    return Handle()


def pread(h, buf, offset, flags):
    h.reads += 1
    parameters["reads"] = parameters.get("reads", 0) + 1
    text = f"{h.reads} {parameters['reads']} {type(h).__name__} {h.__class__.__module__}".encode()
    buf[:] = text.ljust(len(buf), b".")[: len(buf)]
