# SPDX-License-Identifier: Apache-2.0
"""Every callback of version 2, those about abilities too."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def export_description(h):
    return "a disk with everything"


def block_size(h):
    return (1, 4096, 65536)


def is_rotational(h):
    return True


def can_multi_conn(h):
    return True


def can_write(h):
    return True


def can_flush(h):
    return True


def can_trim(h):
    return True


def can_zero(h):
    return True


def can_fast_zero(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_cache(h):
    return nbdkit.CACHE_NATIVE


def can_extents(h):
    return True
