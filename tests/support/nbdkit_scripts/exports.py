# SPDX-License-Identifier: Apache-2.0
"""list_exports returns list=EXPRESSION, default_export default=EXPRESSION; reads give the export's name."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2


def config_complete():
    for name, parameter in (("list_exports", "list"), ("default_export", "default")):
        if parameter in parameters:
            globals()[name] = lambda readonly, is_tls, parameter=parameter: eval(parameters[parameter])


def open(readonly):
    if nbdkit.export_name() == "refused":
        raise RuntimeError("there is no such export")
    return nbdkit.export_name()


def pread(h, buf, offset, flags):
    text = h.encode().ljust(offset + len(buf), b".")
    buf[:] = text[offset : offset + len(buf)]
