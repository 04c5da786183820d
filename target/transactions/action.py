# SPDX-License-Identifier: Apache-2.0
"""The base class of actions, and all there are by name.

    class Resize(Action, type="block_resize"):
        class Data(Arguments): ...
        async def prepare(self) -> None: ...

A bitmap or a job action is one more class; nothing else changes.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from target.qmp.registry import OneOf

if TYPE_CHECKING:
    from target.graph.change import Change
    from target.service import Service

_types: dict[str, type[Action]] = {}


class Action:
    """One action of a transaction. ``change`` is the change of the graph that the whole transaction is.

    In order, for all actions: ``prepare``, then ``commit``. When one of either fails, ``abort`` of each that
    was prepared, the last first. At the end, in either case, ``clean`` of each that was prepared. What an
    action does by ``change`` is undone by it, in its place in that order; ``change.later`` is for what cannot
    be undone.
    """

    type: ClassVar[str]
    Data: ClassVar[builtins.type[msgspec.Struct] | OneOf]
    features: ClassVar[tuple[str, ...]] = ()  # of the command, in query-qmp-schema
    groupable: ClassVar[bool] = False  # whether completion-mode=grouped means something: jobs

    def __init_subclass__(cls, *, type: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert type not in _types, f"two actions have the type {type}"
        cls.type = type
        _types[type] = cls

    def __init__(self, service: Service, change: Change, data: Any) -> None:
        self.service = service
        self.graph = service.graph
        self.change = change
        self.data = data

    async def prepare(self) -> None:
        """Does it, so that it can be undone. BlockError or OSError refuse the transaction."""

    async def commit(self) -> None:
        """All are prepared. What must not begin before (a job) begins here."""

    async def abort(self) -> None:
        """Undoes what ``prepare`` and ``commit`` did outside of ``change``."""

    async def clean(self) -> None:
        """It is over. Cannot fail."""


def types() -> dict[str, builtins.type[Action]]:
    """All actions by name, sorted."""
    return dict(sorted(_types.items()))


def action_type(name: str) -> builtins.type[Action]:
    return _types[name]
