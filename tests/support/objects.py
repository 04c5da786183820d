# SPDX-License-Identifier: Apache-2.0
"""User objects outside of a service."""

from __future__ import annotations

from target.datapath import Datapath
from target.objects import UserObject, parse_object


def unstarted(kind: str, **options: str) -> UserObject:
    """An object with the id `pw`. It gets no datapath that works: secrets need none."""
    found, parsed = parse_object({"qom-type": kind, "id": "pw", **options})
    return found(parsed, Datapath.__new__(Datapath))


def made(kind: str, **options: str) -> UserObject:
    """The same, started."""
    created = unstarted(kind, **options)
    created.start()
    return created
