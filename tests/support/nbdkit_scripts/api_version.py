# SPDX-License-Identifier: Apache-2.0
"""API_VERSION is the environment's PLUGIN_API_VERSION, an expression: parameters come too late for it."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = eval(os.environ["PLUGIN_API_VERSION"])
