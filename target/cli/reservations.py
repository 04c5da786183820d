# SPDX-License-Identifier: Apache-2.0
"""``blocktarget reservations``: persistent reservations of the device below a node."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from target.cli import options
from target.cli.daemon import Action, act, parse, show_help
from target.cli.errors import EXIT_ERROR, UsageError, report
from target.cli.run import StartError
from target.config.keyval import parse_argument
from target.config.options import OptionError, parse_int
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.graph.node import Node
    from target.reservations import Reservations, Type

EXIT_CONFLICT = 2
EXIT_REFUSED = 3

USAGE = """\
Usage: blocktarget reservations [options] --blockdev OPTIONS ACTION[,key=K][,sa-key=K][,type=T]...
Persistent reservations (SPC-4) of the device of a node. Its driver is iscsi, or host_device or file, with
pr-manager or with the privilege for SG_IO. Several actions follow each other in one session.

  read-keys              shows the registered keys
  read-reservation       shows the reservation
  read-full-status       shows who is registered, and with what
  report-capabilities    shows what the device supports
  register               gives this initiator the key sa-key in place of key (unless given: of none);
                         sa-key=0 unregisters
  register-ignore        the same, whatever key it has
  reserve                reserves, with key and type
  release                releases, with key and the same type
  preempt                removes those registered with sa-key, and takes over their reservation
  preempt-abort          the same, and their commands are aborted
  clear                  removes the reservation and all keys

  --blockdev <options>   the node, as for 'blocktarget daemon'; node-name may be left out
  --object <options>     an object that it needs: a secret, a pr-manager-helper
  --key <key>            the key registered for this initiator, for actions without key=;
                         after a register it is the one that was registered
  --sa-key <key>         the new key, or that to be preempted, for actions without sa-key=
  --type <type>          write-exclusive, exclusive-access, each alone or with -registrants-only or
                         -all-registrants
  --aptpl                registrations are to persist through power loss
  --all-target-ports     registers at all ports of the target
  --output <format>      human (default) or json
  -h, --help             shows this help

Exit status: 0 done, 1 error, 2 reservation conflict, 3 the device refused for another reason.
"""

KNOWN = {
    "blockdev": True,
    "object": True,
    "key": True,
    "sa-key": True,
    "type": True,
    "aptpl": False,
    "all-target-ports": False,
    "output": True,
    "help": False,
}
# What each action needs, apart from the key.
NEEDS = {
    "read-keys": (),
    "read-reservation": (),
    "read-full-status": (),
    "report-capabilities": (),
    "register": ("sa-key",),
    "register-ignore": ("sa-key",),
    "reserve": ("key", "type"),
    "release": ("key", "type"),
    "preempt": ("key", "sa-key", "type"),
    "preempt-abort": ("key", "sa-key", "type"),
    "clear": ("key",),
}


class Step(NamedTuple):
    """One action with what was given for it."""

    name: str
    key: int | None
    sa_key: int | None
    type: Type | None


class Request(NamedTuple):
    """The whole command line."""

    set_up: list[Action]
    steps: list[Step]
    aptpl: bool
    all_target_ports: bool
    json: bool


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, {"h": "help"})
    set_up: list[Action] = []
    values: dict[str, str] = {}
    for option in given:
        if option.name == "help":
            print(USAGE, end="")
            return 0
        if option.name in ("blockdev", "object"):
            argument = parse(option)
            if argument.help:
                print(show_help(option.name, argument))
                return 0
            set_up.append(Action(option.name, argument))
        else:
            values[option.name] = option.argument
    return _run(_request(set_up, others, values))


# ---- the command line ----


def _request(set_up: list[Action], words: list[str], values: dict[str, str]) -> Request:
    if [action.option for action in set_up].count("blockdev") != 1:
        raise UsageError("reservations: exactly one --blockdev is expected")
    for action in set_up:
        if action.option == "blockdev":
            action.argument.value.setdefault("node-name", "device")
    if not words:
        raise UsageError("reservations: an action is expected; try 'blocktarget reservations --help'")
    if values.get("output", "human") not in ("human", "json"):
        raise UsageError(f"option --output: expects human or json, not '{values['output']}'")
    defaults: dict[str, str] = {name: values[name] for name in ("key", "sa-key", "type") if name in values}
    steps: list[Step] = []
    for word in words:
        steps.append(_step(word, defaults))
        if steps[-1].name.startswith("register"):
            defaults["key"] = str(steps[-1].sa_key)
    return Request(
        set_up, steps, "aptpl" in values, "all-target-ports" in values, values.get("output") == "json"
    )


def _step(word: str, defaults: dict[str, str]) -> Step:
    try:
        own = dict(parse_argument(word, "action").value)
    except OptionError as error:
        raise UsageError(f"action '{word}': {error}") from None
    name = str(own.pop("action", ""))
    if name not in NEEDS:
        raise UsageError(f"reservations: unknown action '{name}'; try 'blocktarget reservations --help'")
    for member in own:
        if member not in ("key", "sa-key", "type"):
            raise UsageError(f"action '{name}': Parameter '{member}' is unexpected")
    members = {**defaults, **own}
    for member in NEEDS[name]:
        if member not in members:
            raise UsageError(f"action '{name}': '{member}' is missing")
    return Step(
        name,
        _key(name, "key", members.get("key")),
        _key(name, "sa-key", members.get("sa-key")),
        _type(name, members.get("type")),
    )


def _key(action: str, member: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        key = parse_int(text)
    except ValueError:
        key = -1
    if not 0 <= key < 1 << 64:
        raise UsageError(f"action '{action}': '{member}' expects a number of 64 bits, not '{text}'")
    return key


def _type(action: str, text: str | None) -> Type | None:
    from target.reservations import Type

    if text is None:
        return None
    for kind in Type:
        if kind.label == text:
            return kind
    known = ", ".join(kind.label for kind in Type)
    raise UsageError(f"action '{action}': 'type' is one of {known}, not '{text}'")


# ---- doing it ----


def _run(request: Request) -> int:
    import uvloop

    from target import drivers

    drivers.load()
    logging.basicConfig(stream=sys.stderr, format="blocktarget: %(message)s", level=logging.WARNING)
    try:
        return uvloop.run(_serve(request))
    except KeyboardInterrupt:
        return 130


async def _serve(request: Request) -> int:
    from target.service import Service

    service = Service()
    try:
        for action in request.set_up:
            await act(service, action)
        (node,) = (node for node in service.graph.nodes.values() if node.owned)
        return await _act_on(node, request)
    except (StartError, BlockError) as error:
        report(str(error))
        return EXIT_ERROR
    finally:
        # Nothing was written, so that what a flush meets at the end (such as a conflict) is no news.
        await service.close()


async def _act_on(node: Node, request: Request) -> int:
    from target.reservations import Conflict, Reservations, ScsiError
    from target.reservations.commands import Malformed

    if not hasattr(node, "scsi_command"):
        report(f"{node.label}: driver '{node.driver}' takes no SCSI commands")
        return EXIT_ERROR
    device = Reservations(node)
    done: list[dict[str, Any]] = []
    status = 0
    for step in request.steps:
        entry: dict[str, Any] = {"action": step.name}
        done.append(entry)
        try:
            entry |= await _act(device, step, request)
        except Conflict:
            entry["error"], status = "reservation conflict", EXIT_CONFLICT
        except ScsiError as error:
            entry["error"], status = str(error), EXIT_REFUSED
        except (Malformed, OSError, BlockError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            entry["error"], status = reason, EXIT_ERROR
        if status:
            report(f"{node.label}: {step.name}: {entry['error']}")
            break
        if not request.json:
            print("".join(f"{line}\n" for line in _lines(entry)), end="", flush=True)
    if request.json:
        print(json.dumps({"actions": done, "unit-attentions": device.attentions}))
    return status


async def _act(device: Reservations, step: Step, request: Request) -> dict[str, Any]:
    """Carries out one action; returns what it reports, with the names of the JSON output."""
    key, sa_key = step.key or 0, step.sa_key or 0
    match step.name:
        case "register" | "register-ignore":
            await device.register(
                key,
                sa_key,
                ignore=step.name == "register-ignore",
                aptpl=request.aptpl,
                all_target_ports=request.all_target_ports,
            )
        case "clear":
            await device.clear(key)
        case "read-keys":
            keys = await device.read_keys()
            return {
                "generation": keys.generation,
                "keys": [_hex(found) for found in keys.keys],
                "more": keys.more,
            }
        case "read-reservation":
            return await _reservation(device)
        case "read-full-status":
            return await _full_status(device)
        case "report-capabilities":
            return await _capabilities(device)
        case _:
            assert step.type is not None  # see NEEDS
            if step.name == "reserve":
                await device.reserve(key, step.type)
            elif step.name == "release":
                await device.release(key, step.type)
            else:
                await device.preempt(key, sa_key, step.type, abort=step.name == "preempt-abort")
    return {}


async def _reservation(device: Reservations) -> dict[str, Any]:
    found = await device.read_reservation()
    if found is None:
        return {"reservation": None}
    return {"reservation": {"key": _hex(found.key), "type": found.type.label}, "generation": found.generation}


async def _full_status(device: Reservations) -> dict[str, Any]:
    return {
        "registrations": [
            {
                "key": _hex(found.key),
                "initiator": found.initiator,
                "target-port": None if found.all_target_ports else found.target_port,
                "holder": found.holder,
                "type": found.type.label if found.type else None,
            }
            for found in await device.read_full_status()
        ]
    }


async def _capabilities(device: Reservations) -> dict[str, Any]:
    found = await device.report_capabilities()
    types = None if found.types is None else [kind.label for kind in found.types]
    return {
        "capabilities": {
            "types": types,
            "persist-through-power-loss": found.persist_through_power_loss,
            "power-loss-active": found.power_loss_active,
            "all-target-ports": found.all_target_ports,
            "specify-initiator-ports": found.specify_initiator_ports,
            "replaces-reserve": found.replaces_reserve,
        }
    }


def _hex(key: int) -> str:
    return f"{key:#018x}"


# ---- for people ----


def _lines(entry: dict[str, Any]) -> list[str]:
    match entry:
        case {"keys": keys}:
            more = ["(there are more)"] if entry["more"] else []
            return [*keys, *more] if keys else ["no keys are registered"]
        case {"reservation": None}:
            return ["no reservation"]
        case {"reservation": found}:
            return [f"reserved {found['type']} by {found['key']}"]
        case {"registrations": found}:
            return [_registration(one) for one in found] or ["nobody is registered"]
        case {"capabilities": found}:
            types = found.pop("types")
            named = "not told" if types is None else ", ".join(types)
            return [f"types: {named}", *(f"{name}: {'yes' if on else 'no'}" for name, on in found.items())]
    return []


def _registration(found: dict[str, Any]) -> str:
    holds = f", holds the reservation {found['type']}" if found["holder"] else ""
    port = "all ports" if found["target-port"] is None else f"port {found['target-port']}"
    return f"{found['key']} {found['initiator']} at {port}{holds}"
