# SPDX-License-Identifier: Apache-2.0
"""pread fails in the way that how=WORD names."""

import threading

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def other_thread():
    thread = threading.Thread(target=nbdkit.set_error, args=(28,))
    thread.start()
    thread.join()
    raise RuntimeError("the other thread set it")


def earlier(h):
    nbdkit.set_error(28)


def raising(error):
    raise error


WAYS = {
    "base": lambda: raising(BaseException("base")),
    "interrupt": lambda: raising(KeyboardInterrupt()),
    "exit": lambda: sys.exit(5),
    "stop": lambda: raising(StopIteration(1)),
    "unprintable": lambda: raising(Unprintable()),
    "surrogate": lambda: raising(ValueError("\udcff \0 text")),
    "oserror": lambda: raising(OSError(28, "no space")),
    "recursion": lambda: WAYS["recursion"](),
    "memory": lambda: bytearray(1 << 62),
    "assert": lambda: raising(AssertionError()),
    "long": lambda: raising(ValueError("x" * 100000)),
    "set only": lambda: nbdkit.set_error(28),
    "set twice": lambda: (nbdkit.set_error(28), nbdkit.set_error(12), raising(ValueError())),
    "set zero": lambda: (nbdkit.set_error(0), raising(ValueError())),
    "set minus": lambda: (nbdkit.set_error(-28), raising(ValueError())),
    "set 9999": lambda: (nbdkit.set_error(9999), raising(ValueError())),
    "other thread": other_thread,
}


def pread(h, buf, offset, flags):
    buf[:] = b"r" * len(buf)
    WAYS[parameters["how"]]()
