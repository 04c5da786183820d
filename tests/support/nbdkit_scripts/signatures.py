# SPDX-License-Identifier: Apache-2.0
"""pread and pwrite are callables of the kind that kind=WORD names."""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2
good_pread, good_pwrite = pread, pwrite


class Object:
    def __call__(self, h, buf, offset, flags):
        buf[:] = b"o" * len(buf)

    def method(self, h, buf, offset, flags):
        buf[:] = b"m" * len(buf)


class Constructor:
    def __init__(self, h, buf, offset, flags):
        buf[:] = b"c" * len(buf)


async def asynchronous(h, buf, offset, flags):
    good_pread(h, buf, offset, flags)


def generator(h, buf, offset, flags):
    yield good_pread(h, buf, offset, flags)


def with_keywords(h, buf, offset, flags, *, more=1, **others):
    good_pread(h, buf, offset, flags)


KINDS = {
    "fewer": (lambda h, buf, offset: good_pread(h, buf, offset, 0), lambda h, buf, offset: None),
    "more": (lambda h, buf, offset, flags, more: None, lambda h, buf, offset, flags, more: None),
    "defaults": (lambda h, buf, offset, flags=0, more=1: good_pread(h, buf, offset, 0), good_pwrite),
    "any": (lambda *all: good_pread(*all), lambda *all, **named: good_pwrite(*all)),
    "keywords": (with_keywords, lambda h, buf, offset, flags, *, more: None),
    "object": (Object(), good_pwrite),
    "method": (Object().method, good_pwrite),
    "class": (Constructor, good_pwrite),
    "partial": (functools.partial(good_pread), functools.partial(good_pwrite)),
    "cached": (functools.wraps(good_pread)(lambda *all: good_pread(*all)), good_pwrite),
    "asynchronous": (asynchronous, good_pwrite),
    "generator": (generator, good_pwrite),
    "builtin": (print, len),
}


def config_complete():
    globals()["pread"], globals()["pwrite"] = KINDS[parameters["kind"]]
