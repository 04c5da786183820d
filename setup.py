# SPDX-License-Identifier: Apache-2.0
"""Declares the C extensions, optional ones where their library is. Everything else is in pyproject.toml."""

import runpy

from setuptools import setup

CORE = "target/datapath/build.py"
OPTIONAL = ["target/datapath/iscsi/build.py"]
found = [path for path in OPTIONAL if runpy.run_path(path)["available"]()]

setup(cffi_modules=[f"{path}:ffibuilder" for path in [CORE, *found]])
