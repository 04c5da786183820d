# SPDX-License-Identifier: Apache-2.0
"""Sector 0 gives the parameters in the order in which they came; some values are refused."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2
given = []


def config(key, value):
    if value == "raise":
        raise ValueError(f"{key} is not to my taste")
    if value == "exit":
        sys.exit(3)
    given.append((key, value))


def config_complete():
    if ("complete", "no") in given:
        raise KeyError("complete")


def get_ready():
    if ("ready", "no") in given:
        raise OSError("not ready")


def after_fork():
    if ("fork", "no") in given:
        raise OSError("no fork")


def preconnect(readonly):
    if ("connect", "no") in given:
        raise OSError("no connection")


def pread(h, buf, offset, flags):
    buf[:] = repr(given).encode().ljust(offset + len(buf))[offset : offset + len(buf)]
