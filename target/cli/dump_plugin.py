# SPDX-License-Identifier: Apache-2.0
"""``blocktarget dump-plugin``: what an nbdkit Python plugin says about itself."""

from __future__ import annotations

import subprocess
import sys

from target.cli import options
from target.cli.errors import UsageError
from target.nbdkit import boot

USAGE = """\
Usage: blocktarget dump-plugin SCRIPT [KEY=VALUE]... [options]
Loads a script written to nbdkit's Python plugin interface, in a process of its own, with these
parameters, and prints what it has: as `nbdkit python SCRIPT --dump-plugin` does, with what the
script's own dump_plugin prints at the end.

  --exports              prints the exports that the plugin offers instead, one a line
  --python <file>        the interpreter (default: the one that runs this program)
  -h, --help             shows this help
"""

KNOWN = {"exports": False, "python": True, "help": False}


def main(words: list[str]) -> int:
    """The exit status: 1 after the plugin's own message when it fails."""
    given, others = options.split(words, KNOWN, {"h": "help"})
    values = {option.name: option.argument for option in given}
    if "help" in values:
        print(USAGE, end="")
        return 0
    if not others:
        raise UsageError("dump-plugin: a script is expected")
    script, *config = others
    for pair in config:
        if "=" not in pair:
            raise UsageError(f"dump-plugin: expects key=value, not '{pair}'")
    python = values.get("python", sys.executable)
    what = "exports" if "exports" in values else "fields"
    try:
        done = subprocess.run(boot.command(python, "dump", what, script, *config), check=False)
    except OSError as error:
        raise UsageError(f"option --python: cannot run '{python}': {error.strerror}") from None
    return 1 if done.returncode else 0
