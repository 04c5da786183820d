# SPDX-License-Identifier: Apache-2.0
"""What most scripts build on: a disk in memory that has every callback, and notes what it is asked.

With journal=FILE each callback appends a line of JSON: its name and its arguments other than data.
"""

import json
import os

import nbdkit

SIZE = 65536
PAGE = 4096
HOLE = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

data = bytearray(SIZE)
parameters = {}


def note(name, *arguments):
    if "journal" in parameters:
        line = json.dumps([name, *arguments]) + "\n"
        fd = os.open(parameters["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode())
        os.close(fd)


def config(key, value):
    parameters[key] = value


def open(readonly):
    note("open", readonly)
    return {"handle": 1}


def close(h):
    note("close")


def get_size(h):
    note("get_size")
    return SIZE


def pread(h, buf, offset, flags):
    note("pread", len(buf), offset, flags)
    buf[:] = data[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    note("pwrite", len(buf), offset, flags)
    data[offset : offset + len(buf)] = buf


def flush(h, flags):
    note("flush", flags)


def trim(h, count, offset, flags):
    note("trim", count, offset, flags)
    data[offset : offset + count] = b"T" * count


def zero(h, count, offset, flags):
    note("zero", count, offset, flags)
    data[offset : offset + count] = bytes(count)


def cache(h, count, offset, flags):
    note("cache", count, offset, flags)


def extents(h, count, offset, flags):
    note("extents", count, offset, flags)
    found = []
    for at in range(offset // PAGE * PAGE, offset + count, PAGE):
        found.append((at, PAGE, 0 if any(data[at : at + PAGE]) else HOLE))
    return found
