# SPDX-License-Identifier: Apache-2.0
"""nvme: a namespace of an NVMe controller, driven from user space over VFIO.

``spec`` declares registers and structures, ``admin`` and ``controller`` set the controller up, ``hardware``
is what VFIO and the datapath give, ``recovery`` acts on stuck commands, ``node`` is the driver. The I/O
queues run in the datapath: see nvme.h there.
"""

from target.drivers.protocol.nvme.node import Nvme

__all__ = ["Nvme"]
