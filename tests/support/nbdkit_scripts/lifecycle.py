# SPDX-License-Identifier: Apache-2.0
"""Notes every callback outside of requests, in its order."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config(key, value):
    parameters[key] = value
    note("config", key)


def config_complete():
    note("config_complete")


def thread_model():
    note("thread_model")
    return nbdkit.THREAD_MODEL_SERIALIZE_CONNECTIONS


def get_ready():
    note("get_ready")


def after_fork():
    note("after_fork")


def cleanup():
    note("cleanup")


def preconnect(readonly):
    note("preconnect", readonly)


def default_export(readonly, is_tls):
    note("default_export", readonly, is_tls)
    return ""


def export_description(h):
    return "described"


def block_size(h):
    note("block_size")
    return (1, 4096, 0xFFFFFFFF)


def can_write(h):
    note("can_write")
    return True


def can_zero(h):
    note("can_zero")
    return True


def can_fast_zero(h):
    note("can_fast_zero")
    return True


def can_trim(h):
    note("can_trim")
    return True


def can_fua(h):
    note("can_fua")
    return nbdkit.FUA_EMULATE


def can_flush(h):
    note("can_flush")
    return True


def can_cache(h):
    note("can_cache")
    return nbdkit.CACHE_EMULATE


def can_extents(h):
    note("can_extents")
    return True


def can_multi_conn(h):
    note("can_multi_conn")
    return False


def is_rotational(h):
    note("is_rotational")
    return False
