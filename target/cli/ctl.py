# SPDX-License-Identifier: Apache-2.0
"""``blocktarget ctl``: commands to a running target, by hand or from scripts."""

from __future__ import annotations

import json
import os
import sys
from functools import cached_property

from target.cli import options
from target.cli.errors import EXIT_ERROR, UsageError, report
from target.ctl import completion, shell, show
from target.ctl.client import Client, ClientError, CommandFailed, Json, default_socket
from target.ctl.schema import ArgumentError, Schema
from target.ctl.words import arguments

USAGE = """\
Usage: blocktarget ctl [options] [COMMAND [name=value ... | JSON]]
Sends a QMP command to a running target and shows the answer. Without a command it reads lines: from a
terminal with completion, from a script until one fails.

  blocktarget ctl query-named-block-nodes flat=on
  blocktarget ctl blockdev-add driver=qcow2 node-name=disk file.driver=file file.filename=disk.qcow2
  blocktarget ctl transaction '{"actions": [...]}'

  commands [PART]        lists the commands (whose names contain PART)
  help COMMAND           shows a command's arguments
  events [NAME ...]      shows events until it is interrupted (those of these names)

  -s, --socket <path>    the target's monitor; else $BLOCKTARGET_SOCKET, or the first that exists of
                         $XDG_RUNTIME_DIR/blocktarget/qmp.sock and /run/blocktarget/qmp.sock
  -j, --json             prints answers and events as they came, one in a line
      --fd <number>      passes a descriptor along, for add-fd and getfd; may be given several times
      --count <n>        ends after so many events
      --timeout <s>      seconds to wait for an answer, or for events
      --completion bash  prints a script by which bash completes words:
                         source <(blocktarget ctl --completion bash)
  -h, --help             shows this help

The exit status is 0, or 1 when the target refuses the command or cannot be reached.
"""

KNOWN = {
    "socket": True,
    "json": False,
    "fd": True,
    "count": True,
    "timeout": True,
    "completion": True,
    "complete": True,
    "help": False,
}
SHORT = {"s": "socket", "j": "json", "h": "help"}


class Ctl:
    """One run of the program."""

    def __init__(self, words: list[str]) -> None:
        given, self.words = options.split(words, KNOWN, SHORT)
        self.options = {option.name: option.argument for option in given}
        self.fds = [number("fd", option.argument) for option in given if option.name == "fd"]
        self.json = "json" in self.options
        self.count = number("count", self.options["count"]) if "count" in self.options else None
        self.timeout = seconds(self.options["timeout"]) if "timeout" in self.options else None

    @cached_property
    def client(self) -> Client:
        return Client(self.options.get("socket") or default_socket(), self.timeout)

    @cached_property
    def schema(self) -> Schema:
        return Schema(self.client.execute("query-qmp-schema"))

    def run(self) -> int:
        if self.words:
            return 0 if self.line(self.words) else EXIT_ERROR
        _ = self.client  # an error at once, not with the first line
        return 0 if shell.loop(self.line, lambda: self.schema) else EXIT_ERROR

    def line(self, words: list[str]) -> bool:
        """Carries out one command, and shows what comes of it. False when it failed."""
        name, *rest = words
        try:
            match name:
                case "commands":
                    self.list_commands(rest)
                case "help":
                    self.help(rest)
                case "events":
                    self.show_events(rest)
                case _:
                    self.command(name, rest)
        except CommandFailed as error:
            if self.json:
                print(json.dumps(error.message), flush=True)
            else:
                report(str(error))
            return False
        except ArgumentError as error:
            report(str(error))
            return False
        return True

    def command(self, name: str, words: list[str]) -> None:
        if name.startswith("{"):
            message = whole(name)
        else:
            plain = not words or words[0].startswith("{")
            schema = Schema(()) if plain else self.schema
            message = {"execute": name, "arguments": arguments(schema, name, words)}
        answer = self.client.ask(message, self.fds)
        text = json.dumps(answer) if self.json else show.answer(answer["return"])
        if text:
            print(text, flush=True)

    def list_commands(self, words: list[str]) -> None:
        for name in sorted(self.schema.commands):
            if all(word in name for word in words):
                print(name)

    def help(self, words: list[str]) -> None:
        if not words:
            print(USAGE, end="")
        for word in words:
            text = show.command_help(self.schema, word)
            if text is None:
                raise ArgumentError(f"The command {word} has not been found")
            print(text)

    def show_events(self, names: list[str]) -> None:
        left = self.count
        while left is None or left > 0:
            event = self.client.next_event(self.timeout)
            if event is None:
                raise ArgumentError(f"no event in {self.timeout} seconds")
            if names and event["event"] not in names:
                continue
            print(json.dumps(event) if self.json else show.event(event), flush=True)
            left = None if left is None else left - 1


def main(words: list[str]) -> int:
    ctl = Ctl(words)
    if "help" in ctl.options:
        print(USAGE, end="")
        return 0
    if "completion" in ctl.options:
        print(completion.script(ctl.options["completion"]), end="")
        return 0
    try:
        if "complete" in ctl.options:
            return complete(ctl)
        return ctl.run()
    except ClientError as error:
        report(str(error))
    except TimeoutError:
        report(f"no answer in {ctl.timeout} seconds")
    except BrokenPipeError:
        quit_silently()
    except KeyboardInterrupt:
        return 130
    return EXIT_ERROR


def complete(ctl: Ctl) -> int:
    """What the shell's script asks for; a target that is not there has nothing to offer."""
    for found in completion.choices(ctl.options["complete"], lambda path: Client(path, 2.0)):
        print(found)
    return 0


def whole(text: str) -> Json:
    """A message as it is to be sent."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"JSON parse error, {error}") from None
    if not isinstance(message, dict) or "execute" not in message:
        raise ArgumentError("a message needs a member 'execute'")
    return message


def number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"option '--{name}' expects a number, not '{text}'")
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1e9:
        raise UsageError(f"option '--timeout' expects a number of seconds, not '{text}'")
    return found


def quit_silently() -> None:
    """Nobody reads what is printed any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
