# SPDX-License-Identifier: Apache-2.0
"""Completion of words in the shell: a script for bash, which asks the program, which asks the target."""

from __future__ import annotations

from collections.abc import Callable

from target.ctl.client import Client, ClientError, CommandFailed, default_socket
from target.ctl.schema import Schema
from target.ctl.words import candidates

OPTIONS = ("--socket", "--json", "--fd", "--count", "--timeout", "--completion", "--help")
LOCAL = ("commands", "events", "help")

# bash splits words at "=", so what stands before the last one is taken off.
BASH = """\
_blocktarget() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##* }"
    COMPREPLY=()
    [ "${COMP_WORDS[1]}" = ctl ] || return
    local before="${word%"${word##*=}"}"
    mapfile -t COMPREPLY < <("${COMP_WORDS[0]}" ctl --complete "$line" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    case "${COMPREPLY[0]}" in
        *= | *.) compopt -o nospace ;;
    esac
}
complete -o default -F _blocktarget blocktarget
"""


def script(shell: str) -> str:
    """The script for a shell. UsageError for one that is not known."""
    from target.cli.errors import UsageError

    if shell != "bash":
        raise UsageError(f"option '--completion' does not accept value '{shell}'; there is bash")
    return BASH


def choices(line: str, connect: Callable[[str], Client]) -> list[str]:
    """For the last word of a command line that begins with ``blocktarget ctl``."""
    _, _, *words = [*line.split(" ")]
    words = [word for word in words[:-1] if word] + words[-1:]
    path = default_socket()
    while len(words) > 1 and words[0].startswith("-"):
        option, *words = words
        if option in ("-s", "--socket", "--fd", "--count", "--timeout"):
            if len(words) == 1:
                return []
            path = words[0] if option in ("-s", "--socket") else path
            words = words[1:]
        elif option.startswith("--socket="):
            path = option.removeprefix("--socket=")
    if len(words) == 1 and words[0].startswith("-"):
        return [option for option in OPTIONS if option.startswith(words[0])]
    try:
        with connect(path) as client:
            schema = Schema(client.execute("query-qmp-schema"))
    except (ClientError, CommandFailed, TimeoutError):
        return []
    return candidates(schema, words, LOCAL)
