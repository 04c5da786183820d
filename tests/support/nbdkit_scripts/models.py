# SPDX-License-Identifier: Apache-2.0
"""model=EXPRESSION is the thread model. Reads show how many callbacks ran at the same time at most."""

import threading
import time

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2
lock = threading.Lock()
running = 0
most = 0


def thread_model():
    return eval(parameters["model"])


def pread(h, buf, offset, flags):
    global most, running
    if offset == 0:
        buf[:] = bytes([most]) * len(buf)
        return
    with lock:
        running += 1
        most = max(most, running)
    time.sleep(0.1)
    with lock:
        running -= 1
    buf[:] = bytes(len(buf))
