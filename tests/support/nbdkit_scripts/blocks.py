# SPDX-License-Identifier: Apache-2.0
"""block_size returns sizes=EXPRESSION."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def block_size(h):
    return eval(parameters["sizes"])
