# SPDX-License-Identifier: Apache-2.0
"""can_fua returns level=NUMBER; flush is there or not (flush=no)."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config_complete():
    if parameters.get("flush") == "no":
        del globals()["flush"]


def can_fua(h):
    return int(parameters["level"])
