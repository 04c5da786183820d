# SPDX-License-Identifier: Apache-2.0
"""SCSI persistent reservations (SPC-4): typed commands, and the ways by which they reach a device."""

from target.reservations.client import Reservations
from target.reservations.commands import (
    Capabilities,
    InAction,
    Keys,
    OutAction,
    Registration,
    Reservation,
    Scope,
    Type,
)
from target.reservations.sense import CheckCondition, Conflict, ScsiError, Sense
from target.reservations.transports import Answer, Transport

__all__ = [
    "Answer",
    "Capabilities",
    "CheckCondition",
    "Conflict",
    "InAction",
    "Keys",
    "OutAction",
    "Registration",
    "Reservation",
    "Reservations",
    "Scope",
    "ScsiError",
    "Sense",
    "Transport",
    "Type",
]
