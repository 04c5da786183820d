# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out: in one transaction, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from target.config.options import Notation, OptionError
from target.config.parse import parse_blockdev
from target.declarative.plan import CHILDREN, Facts, Phase, Plan, Planner, Step, inline_names
from target.declarative.state import (
    AS_IT_IS,
    Entry,
    State,
    View,
    address,
    encode,
    file_name,
    generic,
    running,
)
from target.graph.options import Settings
from target.graph.reopen import refusal
from target.objects import parse_object
from target.objects import types as object_types
from target.transactions.request import parse_action
from target.transactions.run import run

if TYPE_CHECKING:
    from target.graph.node import Node
    from target.service import Service

NAMES = CHILDREN | {"node-name", "bottom"}
ALONE = generic(Settings())  # of a node that no other was opened for
ORDER = [phase for phase in Phase if phase is not Phase.OBJECTS_DEL]


def make_plan(service: Service, wanted: State, force: bool = False) -> Plan:
    """What has to be done. Touches nothing."""
    wanted = with_real_names(service, wanted)
    inside = frozenset(name for entry in wanted.blockdevs.values() for name in inline_names(entry))
    now = running(service, View(inside=inside, apart=frozenset(wanted.blockdevs)))
    for name, entry in wanted.blockdevs.items():
        node = service.graph.nodes.get(name)
        if node is not None and node.opener is not None:  # what is not given is as it is in other entries
            wanted.blockdevs[name] = ALONE | entry
            wanted.blockdevs[name]["cache"] = ALONE["cache"] | entry.get("cache", {})
    return Planner(now, wanted, facts(service), force).make()


async def carry_out(service: Service, plan: Plan) -> None:
    """Does all of it. BlockError says why it cannot be; then nothing has changed."""
    await run(service, [_request(step) for phase in ORDER for step in plan.steps if step.phase is phase])
    # Objects are in use until the nodes that used them are closed.
    await run(service, [_request(step) for step in plan.steps if step.phase is Phase.OBJECTS_DEL])


def _request(step: Step) -> Any:
    return parse_action({"type": step.type, "data": step.data}, Notation.YAML)


# ---- names ----


def with_real_names(service: Service, wanted: State) -> State:
    """The same with the names that were made up for nodes, in place of those that they have in a file."""
    made_up = {file_name(node): name for name, node in service.graph.nodes.items() if name.startswith("#")}

    def rename(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: rename(member, name) for name, member in value.items()}
        if isinstance(value, list):
            return [rename(item, key) for item in value]
        return made_up.get(value, value) if key in NAMES and isinstance(value, str) else value

    nodes = {made_up.get(name, name): rename(entry) for name, entry in wanted.blockdevs.items()}
    exports = {id: rename(entry) for id, entry in wanted.exports.items()}
    return msgspec.structs.replace(wanted, blockdevs=nodes, exports=exports)


# ---- what the plan asks ----


def facts(service: Service) -> Facts:
    return Facts(
        reopen=lambda entry: _reopen_refusal(service, entry),
        settable=lambda entry: _set_refusal(service, entry),
        default=_default,
        clients=lambda id: len(service.exports[id].clients()) if id in service.exports else 0,
        server_clients=lambda key: _server_clients(service, key),
        exports_above=lambda name: _exports_above(service, name),
        users=lambda name: _users(service, name),
        node=service.graph.nodes.get,
    )


def _find(service: Service, name: str) -> Node:
    return service.graph.nodes[name]


def _reopen_refusal(service: Service, entry: Entry) -> str:
    try:
        return refusal(service.graph, parse_blockdev(entry, Notation.YAML))
    except OptionError as error:
        return str(error)


def _set_refusal(service: Service, entry: Entry) -> str:
    kind, options = parse_object(entry, Notation.YAML)
    item = service.objects[options.id]
    if type(item) is not kind:
        return f"its type cannot change from {item.type} to {kind.type}"
    before, after = encode(item.options), encode(options)
    for key in before.keys() | after.keys():
        if before.get(key) != after.get(key) and key not in item.live:
            return f"'{key}' cannot change"
    return ""


def _default(kind: str, key: str) -> Any:
    return object_types()[kind].default(key)


def _server_clients(service: Service, key: str) -> int:
    for server in service.nbd_servers:
        if address(encode(server.options)) == key:
            return server.connections
    return 0


def _above(service: Service, name: str) -> list[Node]:
    found = [_find(service, name)]
    for node in found:
        for edge in node.parents:
            if edge.parent is not None and edge.parent not in found:
                found.append(edge.parent)
    return found


def _exports_above(service: Service, name: str) -> list[str]:
    above = _above(service, name)
    return [id for id, export in service.exports.items() if export.edge.node in above]


def _users(service: Service, name: str) -> list[str]:
    users = _above(service, name)[1:]
    return [user.name for user in users if user.opener is None or not AS_IT_IS.is_inline(user.opener)]
