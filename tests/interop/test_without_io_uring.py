# SPDX-License-Identifier: Apache-2.0
"""Where io_uring is forbidden the target says so once, and serves all the same with every aio."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import blocktarget_argv
from tests.support.sandbox import without_io_uring

SECONDS = 60
WARNING = "blocktarget: io_uring cannot be used here: nodes with aio=io_uring run on the thread pool\n"
STEPS = ["write -P 1 0 3M", "write -P 2 5000 70000", "write -z 1M 64k", "flush", "write -f -P 3 2M 4k"]
CHECKS = ["read -P 1 0 5000", "read -P 2 5000 70000", "read -P 0 1M 64k", "read -P 3 2M 4k"]


def served(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs qemu-io's steps on the node n, in a target that must not use io_uring."""
    steps = " ".join(f"-c '{step}'" for step in STEPS + CHECKS)
    server = ["--nbd-server", f"addr.type=unix,addr.path={directory}/nbd.sock"]
    export = ["--export", "nbd,id=e,node-name=n,writable=on"]
    return subprocess.run(
        blocktarget_argv("daemon", *words, *server, *export, "--run", f'qemu-io -f raw {steps} "$uri"'),
        preexec_fn=without_io_uring,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("aio", "direct"), [("io_uring", "off"), ("threads", "off"), ("native", "on"), ("io_uring", "on")]
)
def test_all_engines(driver: str, aio: str, direct: str) -> None:
    # Not in the scratch directory: /tmp may be a tmpfs, which has no O_DIRECT.
    image = Path(__file__).with_name(f"sandbox-{driver}.tmp")
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, image, "4M"], check=True)
    try:
        file = f"file.driver=file,file.filename={image},file.aio={aio},file.cache.direct={direct}"
        done = served(["--blockdev", f"{driver},node-name=n,{file}"], image.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == (WARNING if aio == "io_uring" else "")
        assert "Pattern verification failed" not in done.stdout
        if driver == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", image], check=True)
        local = ["qemu-io", "-f", driver, *(word for check in CHECKS for word in ("-c", check)), str(image)]
        assert "verification failed" not in subprocess.check_output(local, text=True)
    finally:
        image.unlink()


def test_several_nodes_give_one_warning(scratch: Path) -> None:
    (scratch / "disk").write_bytes(bytes(4 << 20))
    words: list[str] = []
    for name in ("n", "m"):
        words += ["--blockdev", f"file,node-name={name},filename={scratch}/disk,aio=io_uring"]
    assert served(words, scratch).stderr == WARNING
