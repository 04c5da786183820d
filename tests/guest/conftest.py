# SPDX-License-Identifier: Apache-2.0
"""Boots the small guest on a disk and reads what its job prints; one boot takes seconds."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import guest_python
import pytest
from guest_image import GuestImage, build
from guest_vm import qemu_argv

from tests.support.daemon import Daemon

GUEST_SECONDS = 300


class Guest:
    """A running guest with its console in a file."""

    def __init__(self, scratch: Path, argv: Sequence[str]) -> None:
        self._console = scratch / "console"
        argv = [*argv, "-serial", f"file:{self._console}"]
        self._errors = scratch / "qemu-errors"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=errors)

    def console(self) -> str:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return text.replace("\r", "")

    def _report(self, what: str) -> str:
        return f"{what}\n{self.console()[-4000:]}\n{self._errors.read_text(errors='replace')[-2000:]}"

    def wait_for(self, text: str, seconds: float = GUEST_SECONDS) -> None:
        end = time.monotonic() + seconds
        while text not in self.console():
            assert self.process.poll() is None, self._report(f"the guest ended before it said {text!r}")
            assert time.monotonic() < end, self._report(f"the guest did not say {text!r} in {seconds} s")
            time.sleep(0.1)

    def finish(self) -> dict[str, str]:
        """Waits for the power-off; asserts success, and returns the job's `RESULT name value` lines."""
        try:
            status = self.process.wait(GUEST_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._report(f"the guest still runs after {GUEST_SECONDS} s")) from None
        succeeded = status == 0 and "GUEST-EXIT: 0\n" in self.console()
        assert succeeded, self._report(f"the guest failed ({status})")
        print(self.console())  # which pytest shows when the test fails after this
        rows = [line.split(" ", 2) for line in self.console().splitlines() if line.startswith("RESULT ")]
        return {row[1]: row[2] for row in rows}

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def image_directory() -> Path:
    root = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("BLOCKTARGET_STATE") or root / "var") / "guest"


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    return build(image_directory())


@pytest.fixture(scope="session")
def python_image() -> GuestImage:
    return guest_python.build(image_directory())


@pytest.fixture
def guests(running: list[Daemon]) -> Iterator[list[Guest]]:
    """Those that `boot` has started; one that still runs at the end of the test is killed."""
    booted: list[Guest] = []
    yield booted
    if any(guest.process.poll() is None for guest in booted):
        for daemon in running:
            print(daemon.state())
    for guest in booted:
        guest.kill()


@pytest.fixture
def boot(guest_image: GuestImage, scratch: Path, guests: list[Guest]) -> Callable[..., Guest]:
    """boot(job, devices, cpus=1) starts a guest."""

    def begin(job: str, devices: Sequence[str], *, cpus: int = 1) -> Guest:
        initramfs = guest_image.with_job(job, scratch / "initramfs")
        guests.append(Guest(scratch, [*qemu_argv(guest_image, initramfs, cpus=cpus), *devices]))
        return guests[-1]

    return begin


@pytest.fixture
def boot_python(python_image: GuestImage, scratch: Path, guests: list[Guest]) -> Callable[..., Guest]:
    """boot_python(job, devices, files, cpus=1, append="") starts a guest that has Python and the target.

    The job is a shell script; `files` are more that it finds, by name.
    """

    def begin(
        job: str,
        devices: Sequence[str],
        files: Mapping[str, bytes] | None = None,
        *,
        cpus: int = 1,
        append: str = "",
    ) -> Guest:
        held = {**guest_python.target_files(), **(files or {})}
        initramfs = python_image.with_job(guest_python.ENVIRONMENT + job, scratch / "initramfs", held)
        memory, cpu = guest_python.MEMORY_MIB, guest_python.CPU
        argv = qemu_argv(python_image, initramfs, cpus=cpus, memory_mib=memory, cpu=cpu, append=append)
        guests.append(Guest(scratch, [*argv, *devices]))
        return guests[-1]

    return begin
