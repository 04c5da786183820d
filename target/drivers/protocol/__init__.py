# SPDX-License-Identifier: Apache-2.0
"""Drivers that reach bytes: files, devices, other servers."""
