# SPDX-License-Identifier: Apache-2.0
"""nbd: an export of an NBD server as a disk. Importing the package registers the driver."""

from target.drivers.protocol.nbd.node import Nbd

__all__ = ["Nbd"]
