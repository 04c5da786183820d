# SPDX-License-Identifier: Apache-2.0
"""configs/iscsi.yaml starts against a target, with its password from a file."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.support.daemon import blocktarget_argv, nbd_uri
from tests.support.tgtd import Account, Tgtd, make_disk
from tests.support.tools import qemu_io

ROOT = Path(__file__).resolve().parents[2]
PORTAL = "127.0.0.1:3260"
SIZE = 8 << 20


def test_the_shipped_configuration(scratch: Path) -> None:
    (scratch / "iscsi-password").write_text("secret of twelve")
    with Tgtd(scratch) as tgtd:
        tgtd.add_target(user=Account("initiator", "secret of twelve"))
        disk = tgtd.add_lun(make_disk(scratch / "lun", SIZE))
        text = (ROOT / "configs/iscsi.yaml").read_text()
        assert text.count(PORTAL) == 1
        (scratch / "iscsi.yaml").write_text(text.replace(PORTAL, tgtd.portal))
        argv = blocktarget_argv("serve", scratch / "iscsi.yaml")
        with subprocess.Popen(argv, cwd=scratch, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert any(line.rstrip() == "blocktarget: ready" for line in process.stdout)
                qemu_io(nbd_uri(scratch / "iscsi-nbd.sock"), "write -P 0x33 1M 64k", "read -P 0 0 1M")
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert disk.read_bytes()[1 << 20 : (1 << 20) + 65536] == b"\x33" * 65536
