# SPDX-License-Identifier: Apache-2.0
"""Runs third-party tools. One that is missing fails the test: scripts/test installs them all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

Argument = str | os.PathLike[str]
Completed = subprocess.CompletedProcess[str]


def run(*argv: Argument, check: bool = True, timeout: float = 60, input: str | None = None) -> Completed:
    """Runs a program to its end. With `check`, a failure is an assertion error that shows what it printed."""
    words = [os.fspath(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, input=input or "")
    if check:
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def qemu_img(*argv: Argument, check: bool = True) -> Completed:
    return run("qemu-img", *argv, check=check)


def create_image(
    path: Path, size: str, *, format: str = "qcow2", options: str = "", backing: Path | None = None
) -> Path:
    """A new image made by qemu-img; `backing` is a qcow2 image."""
    words: list[Argument] = ["create", "-q", "-f", format]
    if options:
        words += ["-o", options]
    if backing:
        words += ["-b", backing, "-F", "qcow2"]
    qemu_img(*words, path, size)
    return path


def qemu_io(
    target: Argument, *commands: str, format: str = "raw", check: bool = True, read_only: bool = False
) -> Completed:
    """Runs qemu-io commands on an image or an NBD URI. A pattern that differs fails too."""
    words: list[Argument] = ["qemu-io", "-f", format, *(["-r"] if read_only else [])]
    for command in commands:
        words += ["-c", command]
    done = run(*words, target, check=check)
    if check:
        assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def check_image(path: Path, format: str = "qcow2") -> None:
    """Asserts that qemu-img finds neither errors nor leaked clusters."""
    done = qemu_img("check", "-f", format, "--output=json", path, check=False)
    assert done.returncode == 0, f"qemu-img check: {done.returncode}\n{done.stdout}{done.stderr}"
    report = json.loads(done.stdout)
    assert not report.get("leaks") and not report.get("corruptions"), report


def image_map(path: Argument, format: str) -> list[dict[str, Any]]:
    extents: list[dict[str, Any]] = json.loads(qemu_img("map", "-f", format, "--output=json", path).stdout)
    return extents


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fill(path: Path, size: int, *, seed: int, pieces: int = 60, piece: int = 70_000) -> Path:
    """A sparse raw file of `size` bytes with random pieces at random places, the same for the same seed."""
    source = random.Random(seed)
    with path.open("wb") as handle:
        handle.truncate(size)
        for _ in range(pieces):
            handle.seek(source.randrange(size - piece))
            handle.write(source.randbytes(piece))
    return path
