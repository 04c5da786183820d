# SPDX-License-Identifier: Apache-2.0
"""zero sets errno=NUMBER and raises (raises=yes) or not; it changes nothing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def zero(h, count, offset, flags):
    note("zero", count, offset, flags)
    nbdkit.set_error(int(parameters["errno"]))
    if parameters["raises"] == "yes":
        raise RuntimeError("not here")
