# SPDX-License-Identifier: Apache-2.0
"""blkdebug: requests that fail, wait, or are small. Importing the package registers the driver."""

from target.drivers.filter.blkdebug.node import BlkDebug

__all__ = ["BlkDebug"]
