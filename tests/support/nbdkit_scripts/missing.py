# SPDX-License-Identifier: Apache-2.0
"""callback=NAME: that one (or several, with commas) is not there."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config_complete():
    for name in parameters["callback"].split(","):
        del globals()[name]
