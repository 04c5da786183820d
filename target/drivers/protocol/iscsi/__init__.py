# SPDX-License-Identifier: Apache-2.0
"""iscsi: a LUN of an iSCSI target. Data go through target/datapath/iscsi; here are options, login, loss."""

from target.drivers.protocol.iscsi.node import Iscsi

__all__ = ["Iscsi"]
