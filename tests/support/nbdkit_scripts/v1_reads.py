# SPDX-License-Identifier: Apache-2.0
"""Version 1: pread returns value=EXPRESSION, in which the count is n."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 1


def pread(h, count, offset):
    return eval(parameters["value"], {"n": count, "array": __import__("array")})
