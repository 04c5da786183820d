# SPDX-License-Identifier: Apache-2.0
"""PCI devices in user space through Linux's VFIO: groups, containers, registers, interrupts.

IOMMUs of type 1 only. Nothing here knows what a device does. ``python -m target.vfio.bind`` is the program
scripts/vfio-bind.
"""
