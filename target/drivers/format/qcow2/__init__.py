# SPDX-License-Identifier: Apache-2.0
"""qcow2, versions 2 and 3. Importing the package registers the driver."""

from target.drivers.format.qcow2.node import Qcow2

__all__ = ["Qcow2"]
