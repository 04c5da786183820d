# SPDX-License-Identifier: Apache-2.0
"""Declares the C extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["target/datapath/build.py:ffibuilder"])
