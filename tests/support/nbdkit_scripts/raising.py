# SPDX-License-Identifier: Apache-2.0
"""callback=NAME raises, once it is the turn of a client; errno=NUMBER is set before, unless it is empty."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config_complete():
    def fail(*arguments):
        if parameters.get("errno"):
            nbdkit.set_error(int(parameters["errno"]))
        raise RuntimeError("on purpose")

    globals()[parameters["callback"]] = fail


def export_description(h):
    return "text"
