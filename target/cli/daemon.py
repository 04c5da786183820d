# SPDX-License-Identifier: Apache-2.0
"""``blocktarget daemon``: the command line of qemu-storage-daemon. Options act in the order given."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from target import __version__
from target.cli import help, options
from target.cli.errors import UsageError
from target.cli.options import Option
from target.cli.run import RunOptions, StartError, execute
from target.config.keyval import Argument, parse_argument, parse_flat
from target.config.options import OptionError, subject
from target.graph.errors import BlockError

if TYPE_CHECKING:
    from target.service import Service

USAGE = """\
Usage: blocktarget daemon [options]
Serves block nodes. Takes the options of qemu-storage-daemon; they act in the order given.

  --blockdev [driver=]<driver>,node-name=<name>[,read-only=on|off][,cache.direct=on|off]...
                         adds a node to the graph; JSON is taken too
  --chardev [backend=]socket,id=<id>,path=<path>,server=on,wait=off[,max-connections=<n>]
                         where a monitor's clients come in; also file, null, pipe, pty, ringbuf, stdio
  --export [type=]<type>,id=<id>,node-name=<name>[,writable=on|off][,iothread=<id>]...
                         offers a node to clients: nbd, vhost-user-blk
  --monitor [chardev=]<id>[,pretty=on|off]
                         a QMP monitor for the clients of a character device
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
  --nbd-server addr.type=fd,addr.str=<number>
                         listens for NBD clients; may be given several times
  --object iothread,id=<id>[,poll-max-ns=<n>]
                         starts an I/O thread
  --pidfile <path>       writes the process number there once ready, and keeps it locked
  --daemonize            goes to the background once ready
  --run <command>        runs a shell command with $uri, $unixsocket, $port, $exportname; ends with it

  A value of help (--blockdev help, --blockdev file,help) lists what there is.
  -h, --help             shows this help
  -V, --version          shows the version
"""

KNOWN = {
    "blockdev": True,
    "export": True,
    "nbd-server": True,
    "object": True,
    "pidfile": True,
    "daemonize": False,
    "run": True,
    "help": False,
    "version": False,
    "chardev": True,
    "monitor": True,
    "trace": True,
}
SHORT = {"h": "help", "V": "version", "T": "trace"}
IMPLIED = {
    "blockdev": "driver",
    "chardev": "backend",
    "monitor": "chardev",
    "export": "type",
    "object": "qom-type",
    "nbd-server": None,
}
UNSUPPORTED = ("trace",)


class Action(NamedTuple):
    """One option that changes the target."""

    option: str
    argument: Argument


def main(words: list[str]) -> int:
    given, others = options.split(words, KNOWN, SHORT)
    if others:
        raise UsageError(f"{others[0]}: Unexpected argument")
    run = RunOptions()
    actions: list[Action] = []
    for option in given:
        text = immediate(option)
        if text is not None:
            print(text, end="")
            return 0
        apply(option, run, actions)

    async def start(service: Service) -> None:
        for action in actions:
            await act(service, action)

    return execute(start, run)


def immediate(option: Option) -> str | None:
    """What an option shows instead of starting anything."""
    if option.name == "help":
        return USAGE
    if option.name == "version":
        return f"blocktarget version {__version__}\n"
    if option.name in IMPLIED:
        argument = parse(option)
        return show_help(option.name, argument) + "\n" if argument.help else None
    return None


def apply(option: Option, run: RunOptions, actions: list[Action]) -> None:
    """Sorts one option into what the process does and what the target does."""
    if option.name in UNSUPPORTED:
        raise UsageError(f"option --{option.name} is not supported")
    if option.name == "pidfile":
        run.pidfile = option.argument
    elif option.name == "run":
        run.command = option.argument
    elif option.name == "daemonize":
        run.background = True
    else:
        actions.append(Action(option.name, parse(option)))


def parse(option: Option) -> Argument:
    try:
        if option.name == "chardev" and not option.argument.startswith("{"):
            return parse_flat(option.argument, "backend")
        return parse_argument(option.argument, IMPLIED[option.name])
    except OptionError as error:
        raise UsageError(f"option --{option.name}: {error}") from None


async def act(service: Service, action: Action) -> None:
    """Carries out one option. StartError says which option, which node or export, and what is wrong."""
    from target.config.parse import (
        parse_blockdev,
        parse_chardev,
        parse_export,
        parse_monitor,
        parse_nbd_server,
        parse_object,
    )

    value, notation, _ = action.argument
    try:
        match action.option:
            case "blockdev":
                await service.add_blockdev(parse_blockdev(value, notation))
            case "chardev":
                await service.add_chardev(parse_chardev(value, notation))
            case "monitor":
                service.add_monitor(parse_monitor(value, notation))
            case "export":
                await service.add_export(*parse_export(value, notation))
            case "object":
                service.add_object(*parse_object(value, notation))
            case "nbd-server":
                await service.start_nbd_server(parse_nbd_server(value, notation))
    except BlockError as error:
        raise StartError(f"option --{action.option}: {error}") from None
    except OptionError as error:
        raise StartError(f"option --{action.option}: {subject(value)}{error}") from None


def show_help(name: str, argument: Argument) -> str:
    """The types that an option knows, or the members of the type that is named."""
    from target.config import parse as typed

    key = IMPLIED[name]
    if name in ("monitor", "nbd-server"):
        key = None  # there is one type
    kind = argument.value.get(key) if key is not None else name
    known = typed.kinds(name)
    if kind is None:
        return help.list_types(f"Values of '{key}' for --{name}", known)
    if kind not in known:
        raise UsageError(f"option --{name}: Parameter '{key}' does not accept value '{kind}'")
    return help.describe(str(kind), known[str(kind)])
