# SPDX-License-Identifier: Apache-2.0
"""Splits a command line into options with their arguments, in the order given, as getopt_long does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from target.cli.errors import UsageError


class Option(NamedTuple):
    """One option as given; ``argument`` is empty for a flag."""

    name: str
    argument: str


def split(
    words: list[str], known: Mapping[str, bool], short: Mapping[str, str]
) -> tuple[list[Option], list[str]]:
    """The options and the other words. ``known``: name -> takes an argument; ``short``: letter -> name."""
    options: list[Option] = []
    others: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            return options, others + queue
        if not word.startswith("-") or word == "-":
            others.append(word)
            continue
        name, separator, value = _name(word, known, short)
        if not known[name]:
            if separator:
                raise UsageError(f"option '--{name}' doesn't allow an argument")
            value = ""
        elif not separator:
            if not queue:
                raise UsageError(f"option '--{name}' requires an argument")
            value = queue.pop(0)
        options.append(Option(name, value))
    return options, others


def _name(word: str, known: Mapping[str, bool], short: Mapping[str, str]) -> tuple[str, bool, str]:
    """The option's full name, whether it carries an argument in the same word, and that."""
    if word.startswith("--"):
        name, separator, value = word[2:].partition("=")
        if name not in known:
            raise UsageError(f"unrecognized option '--{name}'")
        return name, bool(separator), value
    letter, value = word[1], word[2:]
    if letter not in short:
        raise UsageError(f"invalid option -- '{letter}'")
    return short[letter], bool(value), value
