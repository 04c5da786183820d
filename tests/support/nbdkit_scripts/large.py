# SPDX-License-Identifier: Apache-2.0
"""A disk of 96 MiB whose bytes follow from their place, until they are written. There is no zero."""

import nbdkit

API_VERSION = 2
MIB = 1 << 20
SIZE = 96 * MIB
data = bytearray(bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return 1


def get_size(h):
    return SIZE


def pread(h, buf, offset, flags):
    buf[:] = data[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    data[offset : offset + len(buf)] = buf


def extents(h, count, offset, flags):
    for at in range(0, SIZE, 777777):
        yield at, 777777, at // 777777 % 4
