# SPDX-License-Identifier: Apache-2.0
"""The shipped configuration makes its disk, serves it, and prints commands that attach to it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

from tests.support.daemon import blocktarget_argv, free_port, nbd_uri
from tests.support.serve import CONFIGS, serving
from tests.support.tools import check_image, qemu_img, qemu_io, run

DEMO_PORT = "10809"


def demo() -> str:
    """The shipped file, with a free port in place of its own."""
    text = (CONFIGS / "demo.yaml").read_text()
    assert DEMO_PORT in text
    return text.replace(DEMO_PORT, str(free_port()))


def test_disk_is_made_once_and_served(scratch: Path) -> None:
    disk, uri = scratch / "demo.qcow2", nbd_uri(scratch / "demo-nbd.sock")
    with serving(demo(), scratch):
        qemu_io(uri, "write -P 0x33 5M 64k")
    assert json.loads(qemu_img("info", "--output=json", disk).stdout)["virtual-size"] == 1 << 30
    check_image(disk)
    with serving(demo(), scratch):
        qemu_io(uri, "read -P 0x33 5M 64k", "read -P 0 0 5M")
    check_image(disk)
    assert sorted(path.name for path in scratch.iterdir()) == ["config.yaml", "demo.qcow2"]


def test_printed_commands_attach(scratch: Path) -> None:
    with serving(demo(), scratch) as lines:
        commands = [shlex.split(line.partition(": ")[2]) for line in lines]
        infos = [command for command in commands if command[0] == "nbdinfo"]
        assert len(infos) == 2  # a unix socket and TCP
        for info in infos:
            run(*info)
        (vhost,) = [command for command in commands if any("vhost-user-blk-pci" in word for word in command)]
        assert_qemu_attaches(vhost, scratch)


def assert_qemu_attaches(command: list[str], scratch: Path) -> None:
    """QEMU realizes the device: it reports the disk through its monitor."""
    monitor = scratch / "qmp"
    extra = ["-display", "none", "-S", "-qmp", f"unix:{monitor},server=on,wait=off"]
    with subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, text=True) as qemu:
        try:
            end = time.monotonic() + 30
            while not monitor.exists() and qemu.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            assert qemu.poll() is None, qemu.communicate()[1]
            assert monitor.exists()
        finally:
            qemu.kill()
            qemu.wait()
    os.unlink(monitor)


def test_unit_file_names_a_command_that_exists() -> None:
    unit = (CONFIGS / "systemd/blocktarget@.service").read_text()
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert shlex.split(start)[1] == "serve"
    assert "Type=notify" in unit
    assert run(*blocktarget_argv("serve", "--help")).stdout.startswith("Usage: blocktarget serve")
