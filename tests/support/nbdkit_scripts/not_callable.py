# SPDX-License-Identifier: Apache-2.0
"""callback=NAME is there, but no function."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config_complete():
    globals()[parameters["callback"]] = "no function"
