# SPDX-License-Identifier: Apache-2.0
"""Drivers that change what passes through them."""
