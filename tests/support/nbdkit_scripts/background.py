# SPDX-License-Identifier: Apache-2.0
"""A thread of the plugin's own, started after the fork, changes the disk; a child process is run as well."""

import subprocess
import threading

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from disk import *

API_VERSION = 2
go = threading.Event()
gone = threading.Event()


def work():
    go.wait()
    data[:512] = b"b" * 512
    gone.set()


def after_fork():
    threading.Thread(target=work, daemon=True).start()


def flush(h, flags):
    go.set()
    if not gone.wait(10):
        raise RuntimeError("the thread does not run")
    data[512:515] = subprocess.run(["echo", "hi"], stdout=subprocess.PIPE, check=True).stdout
