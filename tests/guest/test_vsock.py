# SPDX-License-Identifier: Apache-2.0
"""The nbd driver over vsock, inside of a guest: the host's kernel need not have it. See inside/vsock.py."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import Guest

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

Boot = Callable[..., Guest]
PROGRAM = Path(__file__).parent / "inside/vsock.py"
SIZE = 8 << 20


def expected() -> str:
    """The content that inside/vsock.py leaves, worked out once more."""
    source, model = random.Random(1), bytearray(SIZE)
    for _ in range(60):
        offset, length = source.randrange(SIZE // 2 // 4096) * 4096, source.choice((512, 4096, 100_352))
        data = source.randbytes(length) if source.random() < 0.7 else bytes(length)
        model[offset : offset + length] = data
    return hashlib.sha256(model).hexdigest()


def test_nbd_over_vsock(boot_python: Boot) -> None:
    """Requests, several connections, a loss, a URI, and a port at which nobody listens."""
    job = "modprobe vsock_loopback; python3 /vsock.py\n"
    results = boot_python(job, [], {"vsock.py": PROGRAM.read_bytes()}).finish()
    assert int(results["connections"]) >= 1 and int(results["again"]) > int(results["connections"])
    assert results["status"] == results["status-uri"] == "0"
    assert results["violations"] == "0" and int(results["trims-and-zeroes"]) > 5
    status, _, message = results["nobody"].partition(" ")
    assert status == "1" and "node 'disk'" in message and "vsock:1:4444" in message
    assert results["sha256"] == expected()
