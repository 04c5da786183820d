# SPDX-License-Identifier: Apache-2.0
"""Writes its process number to pidfile=FILE; the disk lies in storage=FILE, so that it outlives the process.

A read of the last sector takes as long as it likes: seconds=NUMBER. Starts fail while refuse=FILE is there.
"""

import os
import time

API_VERSION = 2
parameters = {}
SIZE = 65536


def config(key, value):
    parameters[key] = value


def get_ready():
    if os.path.exists(parameters["refuse"]):
        raise RuntimeError("not now")


def after_fork():
    fd = os.open(parameters["pidfile"] + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, str(os.getpid()).encode())
    os.close(fd)
    os.rename(parameters["pidfile"] + ".new", parameters["pidfile"])


def open(readonly):
    return os.open(parameters["storage"], os.O_RDWR)


def get_size(h):
    return SIZE


def pread(h, buf, offset, flags):
    if offset == SIZE - 512:
        time.sleep(float(parameters["seconds"]))
    os.preadv(h, [buf], offset)


def pwrite(h, buf, offset, flags):
    os.pwrite(h, buf, offset)


def flush(h, flags):
    os.fsync(h)
