# SPDX-License-Identifier: Apache-2.0
"""A mock iSCSI target: disks in memory behind the protocol of RFC 7143, which misbehaves as a test tells it.

    python -m target.peers.iscsi_target --size 64M --port 3260

It serves loopback only, one connection for each session, error recovery level 0. It is no target for data
that matter: its disks are gone with it.
"""

from target.peers.iscsi_target.disk import Disk, Features
from target.peers.iscsi_target.login import Account, Limits
from target.peers.iscsi_target.server import TARGET, IscsiTarget

__all__ = ["TARGET", "Account", "Disk", "Features", "IscsiTarget", "Limits"]
