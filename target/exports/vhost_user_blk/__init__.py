# SPDX-License-Identifier: Apache-2.0
"""The vhost-user-blk export: a virtio block device for virtual machines, over shared memory.

messages and device are the protocol's and the device's facts; session gives the messages their meaning;
connection and server do the I/O of the control socket; backend calls the datapath, where the queues run.
"""

from target.exports.vhost_user_blk.export import VhostUserBlkExport

__all__ = ["VhostUserBlkExport"]
