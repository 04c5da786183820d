# SPDX-License-Identifier: Apache-2.0
"""A privileged program that makes persistent reservations for others, with the protocol of qemu-pr-helper.

Whoever may connect to its socket and can open a disk for writing may change the reservations of that disk.
"""

from target.pr_helper.server import PrHelper

__all__ = ["PrHelper"]
