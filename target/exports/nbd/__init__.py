# SPDX-License-Identifier: Apache-2.0
"""NBD: the export type, the servers, and the protocol. Transmission is the datapath's (nbd_*.c)."""

from __future__ import annotations

from target.exports.nbd.export import NbdExport
from target.exports.nbd.server import NbdServer, NbdServerOptions

__all__ = ["NbdExport", "NbdServer", "NbdServerOptions"]
