# SPDX-License-Identifier: Apache-2.0
"""Does what the environment's PLUGIN_TROUBLE says, while it is loaded."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2

exec(os.environ["PLUGIN_TROUBLE"])
