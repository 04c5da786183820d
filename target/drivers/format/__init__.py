# SPDX-License-Identifier: Apache-2.0
"""Drivers that interpret bytes as a disk image."""
