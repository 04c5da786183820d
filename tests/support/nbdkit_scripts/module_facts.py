# SPDX-License-Identifier: Apache-2.0
"""The disk's content is JSON about the nbdkit module and the interpreter's surroundings."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

import json
import threading

API_VERSION = 2
NAMES = ("debug", "export_name", "parse_size", "set_error", "shutdown")
SIZES = (
    "0",
    "1",
    "512b",
    "3k",
    "2K",
    "1M",
    "1G",
    "7s",
    "8E",
    "1.5M",
    "",
    "x",
    "-1",
    "1Q",
    " 5",
    "16E",
    "1kk",
)
main = sys.modules["__main__"]
at_load = [hasattr(main, "__file__"), __name__, sys.argv, len(sys.path) > 3]


def of(function, *arguments):
    try:
        return repr(function(*arguments))
    except BaseException as error:
        return type(error).__name__


def facts():
    return {
        "names": [callable(getattr(nbdkit, name)) for name in NAMES],
        "constants": {k: v for k, v in vars(nbdkit).items() if k.isupper()},
        "sizes": {text: of(nbdkit.parse_size, text) for text in SIZES},
        "wrong sizes": [of(nbdkit.parse_size, value) for value in (None, 5, b"1M", 1.0)],
        "arguments": [of(nbdkit.parse_size), of(nbdkit.parse_size, "1", "2"), of(nbdkit.export_name, 1)],
        "errors": [of(nbdkit.set_error, value) for value in (5, True, "5", 5.0, None, -1, 1 << 31, 1 << 63)],
        "debug": [of(nbdkit.debug, value) for value in ("text", "100% %s", "", 5, None, b"bytes")],
        "name": of(nbdkit.export_name),
        "at load": at_load,
        "now": [
            hasattr(main, "__file__"),
            __name__,
            main.__name__,
            "nbdkit" in sys.modules,
            sys.modules["__main__"] is main,
        ],
        "same globals": vars(main) is globals(),
        "main thread": threading.current_thread() is threading.main_thread(),
        "flags": [sys.flags.ignore_environment, sys.flags.no_site, sys.flags.isolated, sys.flags.safe_path],
        "target": "target" in sys.modules,
    }


def pread(h, buf, offset, flags):
    if not data[0]:
        found = json.dumps(facts(), sort_keys=True).encode()
        data[: len(found)] = found
    buf[:] = data[offset : offset + len(buf)]
