# SPDX-License-Identifier: Apache-2.0
"""nbdkit's notations of sizes, delays, probabilities and passwords. ValueError says what is wrong."""

from __future__ import annotations

import math
import os
import re

INT64_MAX = (1 << 63) - 1
UINT_MAX = (1 << 32) - 1
SPACE = " \t\n\v\f\r"
SIZE = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)(.*)\Z", re.DOTALL)
# What C's strtod takes: decimal and hexadecimal numbers, infinities and NaN.
NUMBER = re.compile(
    r"[ \t\n\v\f\r]*"
    r"([+-]?(?:0[xX](?:[0-9a-fA-F]+\.?[0-9a-fA-F]*|\.[0-9a-fA-F]+)(?:[pP][+-]?[0-9]+)?"
    r"|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    r"|inf(?:inity)?|nan(?:\([A-Za-z0-9_]*\))?))",
    re.IGNORECASE,
)
SCALES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60, "s": 9}
# Nanoseconds. Both letters that look like a mu: the micro sign and the Greek one.
UNITS = {"": 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "\u00b5s": 10**3, "\u03bcs": 10**3, "ns": 1}


def parse_size(text: str) -> int:
    """Bytes: a decimal number with at most one suffix of b k m g t p e (powers of 1024) or s (512)."""
    match = SIZE.match(text)
    if match is None:
        raise ValueError(f"could not parse size string ({text})")
    number, suffix = int(match[1]), match[2]
    if number < 0:
        raise ValueError(f"size cannot be negative ({text})")
    if number > INT64_MAX:
        raise ValueError(f"size ({text}) exceeds maximum value")
    if not suffix:
        return number
    if suffix.lower() not in SCALES:
        raise ValueError(f"could not parse size: unknown suffix '{suffix}'")
    size = number << SCALES[suffix.lower()]
    if size > INT64_MAX:
        raise ValueError(f"overflow computing size ({text})")
    return size


def parse_delay(what: str, text: str) -> tuple[int, int]:
    """Seconds and nanoseconds, of a number with a unit: none or s, ms, us, ns."""
    number, rest = _number(what, text)
    if rest not in UNITS:
        raise ValueError(f"{what}: could not parse delay: '{text}'")
    if number < 0:
        raise ValueError(f"{what}: delay cannot be negative: '{text}'")
    nanoseconds = number * UNITS[rest]
    if not math.isfinite(nanoseconds):
        raise ValueError(f"{what}: delay is not finite: '{text}'")
    seconds, left = divmod(round(nanoseconds), 10**9)
    if seconds > UINT_MAX:
        raise ValueError(f"{what}: delay is too long: '{text}'")
    if nanoseconds and not seconds and not left:
        raise ValueError(f"{what}: delay is below a nanosecond: '{text}'")
    return seconds, left


def parse_probability(what: str, text: str) -> float:
    """0.1, 1e-1, 10%, 1:10 and 1/10 are the same. Finite and not negative; it may be above 1."""
    number, rest = _number(what, text)
    if rest == "%":
        number /= 100
    elif rest[:1] in (":", "/"):
        below, left = _number(what, rest[1:])
        if left:
            raise ValueError(f"{what}: could not parse probability: '{text}'")
        number = _ratio(what, text, number, below)
    elif rest:
        raise ValueError(f"{what}: could not parse probability: '{text}'")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{what}: probability out of range: '{text}'")
    return number


def _ratio(what: str, text: str, above: float, below: float) -> float:
    if below == 0:
        # 0:0 is taken for "never"; anything else over nothing is no probability.
        if above == 0:
            return 0.0
        raise ValueError(f"{what}: probability out of range: '{text}'")
    return above / below


def _number(what: str, text: str) -> tuple[float, str]:
    """The number at the beginning of a text, and what follows it."""
    match = NUMBER.match(text)
    if match is None:
        raise ValueError(f"{what}: could not parse number: '{text}'")
    digits = match[1].lower()
    if "x" in digits:
        value = float.fromhex(digits)
    elif "nan" in digits:
        value = math.nan
    else:
        value = float(digits)
    return value, text[match.end() :]


def read_password(value: str, own: frozenset[int]) -> bytes:
    """The password itself, or "+FILE" or "-FD": the first line of it. own: descriptors not to be read.

    "-" would ask on a terminal, which a process of a target does not have.
    """
    if value == "-":
        raise ValueError("stdin is not available for reading password")
    if value.startswith("-"):
        return _first_line(_descriptor(value[1:], own), value[1:])
    if value.startswith("+"):
        try:
            fd = os.open(value[1:], os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise ValueError(f"open {value[1:]}: {getattr(error, 'strerror', None) or error}") from None
        return _first_line(fd, value[1:])
    return value.encode()


def _descriptor(text: str, own: frozenset[int]) -> int:
    try:
        number = int(text.lstrip(SPACE), 0) if "_" not in text else None
    except ValueError:
        number = None
    if number is None or not -(1 << 31) <= number < 1 << 31:
        raise ValueError(f'password file descriptor: could not parse number: "{text}"')
    if number in (0, 1, 2):
        raise ValueError("cannot use password -FD for stdin/stdout/stderr")
    if number in own:
        raise ValueError(f"fdopen {text}: Bad file descriptor")
    return number


def _first_line(fd: int, what: str) -> bytes:
    try:
        with os.fdopen(fd, "rb") as file:
            return file.readline().removesuffix(b"\n").partition(b"\0")[0]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"could not read password from {what}: {reason}") from None
