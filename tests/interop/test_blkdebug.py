# SPDX-License-Identifier: Apache-2.0
"""The same rules of blkdebug below qcow2 and raw, here and in QEMU's daemon: the same requests fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, blockdev, blocktarget_argv, nbd_export, nbd_server_unix, nbd_uri
from tests.support.tools import create_image, qemu_io, run

QEMU = "qemu-storage-daemon"
Rules = dict[str, list[dict[str, Any]]]

WRITE, READ, FLUSH = "write 0 64k", "read 0 4k", "flush"
NO_SPACE = 28

# Format, rules, commands.
CASES: list[tuple[str, Rules, list[str]]] = [
    ("qcow2", {"inject-error": [{"event": "l2_load", "once": True}]}, [READ, READ, WRITE]),
    (
        "qcow2",
        {"inject-error": [{"event": "write_aio", "errno": NO_SPACE, "once": True}]},
        [WRITE, WRITE, READ],
    ),
    ("qcow2", {"inject-error": [{"event": "read_aio", "sector": 0}]}, [READ, WRITE]),
    (
        "raw",
        {"inject-error": [{"event": "read_aio", "sector": 8, "once": True, "immediately": True}]},
        [READ, "read 4k 4k", "read 4k 4k"],
    ),
    (
        "raw",
        {
            "set-state": [
                {"event": "write_aio", "state": 1, "new_state": 2},
                {"event": "write_aio", "state": 2, "new_state": 3},
            ],
            "inject-error": [{"event": "write_aio", "state": 2, "errno": NO_SPACE, "once": True}],
        },
        [WRITE, WRITE, WRITE, READ],
    ),
    (
        "raw",
        {
            "set-state": [{"event": "flush_to_disk", "new_state": 7}],
            "inject-error": [{"event": "pwritev", "state": 7}, {"event": "read_aio", "state": 7}],
        },
        [WRITE, READ, FLUSH, READ, WRITE, READ],
    ),
    (
        "raw",
        {
            "inject-error": [
                {"event": "none", "iotype": "write", "once": True},
                {"event": "none", "iotype": "read"},
            ]
        },
        [READ, WRITE, WRITE, READ],
    ),
    (
        "raw",
        {"inject-error": [{"event": "flush_to_disk", "iotype": "flush", "once": True}]},
        [FLUSH, FLUSH, READ],
    ),
    ("raw", {"inject-error": [{"event": "pwritev_zero", "state": 2}]}, ["write -z 0 64k", READ]),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_same_requests_fail(
    scratch: Path, start: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    format, rules, commands = CASES[number]
    found = []
    for daemon in ("", QEMU):
        monkeypatch.setenv("BLOCKTARGET_TEST_DAEMON", daemon)
        path = scratch / (daemon or "ours")
        create_image(path, "16M", format=format)
        qemu_io(path, "write -P 1 0 64k", format=format)
        below = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, **rules}
        running = start(
            *blockdev(driver=format, node_name="disk", file=below),
            *nbd_server_unix(scratch / "nbd"),
            *nbd_export(),
        )
        found.append([outcome(nbd_uri(scratch / "nbd"), command) for command in commands])
        running.stop()
        (scratch / "nbd").unlink(missing_ok=True)
    assert found[0] == found[1]
    assert any("ok" in result for result in found[0])


def outcome(uri: str, command: str) -> str:
    # Without the image's end: qemu-io flushes what it has written, and again when it ends.
    done = run("qemu-io", "-f", "raw", "-t", "writeback", "-c", command, uri, check=False)
    text = done.stdout + done.stderr
    failed = next((line for line in text.splitlines() if "failed" in line), "")
    return failed or "ok"


@pytest.mark.parametrize(
    "rules",
    [
        {"inject-error": [{"event": "l3_load"}]},
        {"set-state": [{"event": "none"}]},
        {"set-state": [{"event": "none", "new_state": 2, "x": 1}]},
        {
            "inject-error": [{"event": "none", "state": 4}],
            "set-state": [{"event": "l2_load", "new_state": 4}],
        },
    ],
)
def test_options(scratch: Path, rules: Rules) -> None:
    (scratch / "disk").write_bytes(bytes(1 << 20))
    node: dict[str, Any] = {"driver": "blkdebug", "node-name": "x", **rules}
    node["image"] = {"driver": "file", "filename": str(scratch / "disk")}
    end = ["--object", "no-such-type,id=end"]
    found = []
    for argv in (blocktarget_argv("daemon"), [QEMU]):
        done = run(*argv, "--blockdev", json.dumps(node), *end, check=False, timeout=20)
        said = done.stderr.strip().splitlines()[-1].rpartition("Parameter ")[2]
        found.append(re.sub(r"'[a-z-]+\[\d\]\.", "'", said))  # QEMU names the last member only
    assert found[0] == found[1]
