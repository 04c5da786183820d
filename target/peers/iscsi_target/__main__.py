# SPDX-License-Identifier: Apache-2.0
"""``python -m target.peers.iscsi_target``: runs the mock target until it is interrupted."""

from __future__ import annotations

import argparse
import signal

from target.config.options import parse_size
from target.peers.iscsi_target import TARGET, Account, IscsiTarget


def main() -> None:
    parser = argparse.ArgumentParser(description="A mock iSCSI target on loopback with disks in memory.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--size", type=parse_size, default="64M", help="of each disk")
    parser.add_argument("--block-size", type=int, choices=(512, 4096), default=512)
    parser.add_argument("--luns", type=int, default=1, help="their numbers begin with 1")
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--user", default="", help="NAME%%PASSWORD for CHAP")
    options = parser.parse_args()
    target = IscsiTarget()
    target.port = options.port
    name, _, password = options.user.partition("%")
    target.add_target(options.target, Account(name, password) if name else None)
    for lun in range(1, options.luns + 1):
        target.add_disk(options.size, target=options.target, lun=lun, block_size=options.block_size)
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with target:
        for lun in range(1, options.luns + 1):
            print(target.url(target=options.target, lun=lun), flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
