# SPDX-License-Identifier: Apache-2.0
"""nbdkit-plugin: a script written to nbdkit's Python plugin interface, as a node."""

from __future__ import annotations

from target.drivers.protocol.nbdkit_plugin.node import NbdkitPlugin

__all__ = ["NbdkitPlugin"]
