# SPDX-License-Identifier: Apache-2.0
"""Runs the small guest of guest_image.py in QEMU, without hardware virtualisation (about two seconds a boot).

As a program it boots the guest on a vhost-user-blk export and shows its console: `scripts/run --guest`.
It starts no target.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guest_image import GuestImage, build

# Found by measuring boots under TCG: each of these takes something slow out of the kernel's start.
FAST_BOOT = (
    "mitigations=off nokaslr no_timer_check cryptomgr.notests tsc=reliable rcupdate.rcu_expedited=1 "
    "lpj=4000000"
)
COMMAND_LINE = f"console=ttyS0 quiet panic=-1 net.ifnames=0 {FAST_BOOT}"

DEMO = """
echo
echo "blocktarget: the guest sees /dev/vda with $(cat /sys/block/vda/size) sectors," \\
    "serial '$(cat /sys/block/vda/serial)', queues: $(ls /sys/block/vda/mq | wc -l)"
mount -t ext4 /dev/vda /mnt 2>/dev/null ||
    { mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt; } || exit 1
echo "boot at $(date -u)" >> /mnt/boots
dd if=/dev/urandom of=/mnt/data bs=1M count=8 2>/dev/null
sha256sum /mnt/data > /mnt/data.sha256
sync
umount /mnt
mount -t ext4 /dev/vda /mnt
sha256sum -c /mnt/data.sha256 || exit 1
echo "blocktarget: boots of this disk: $(wc -l < /mnt/boots)"
if grep -q bt.shell /proc/cmdline; then
    echo "blocktarget: /dev/vda is mounted on /mnt; 'exit' powers the guest off"
    setsid cttyhack sh
fi
umount /mnt
"""


def qemu_argv(
    image: GuestImage,
    initramfs: Path,
    *,
    cpus: int = 1,
    memory_mib: int = 256,
    append: str = "",
    cpu: str = "qemu64",
) -> list[str]:
    """QEMU with guest memory that a vhost-user back end can map. Disks and a serial port come after it."""
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", str(cpus), "-m", str(memory_mib)),
        *("-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
        *("-machine", "q35,memory-backend=memory"),
        *("-kernel", str(image.kernel), "-initrd", str(initramfs)),
        *("-append", f"{COMMAND_LINE} {append}".strip()),
    ]


def vhost_user_disk(socket: Path, *, queues: int = 1, reconnect: int = 0) -> list[str]:
    """Arguments for a vhost-user-blk disk; `reconnect` is in seconds, 0 for never."""
    again = f",reconnect={reconnect}" if reconnect else ""
    return [
        *("-chardev", f"socket,id=disk,path={socket}{again}"),
        *("-device", f"vhost-user-blk-pci,chardev=disk,num-queues={queues}"),
    ]


def boot_demo(socket: Path, queues: int, directory: Path) -> int:
    """Boots on the export with the console on the terminal; 0 when the guest's job succeeded."""
    image = build(directory)
    shell = sys.stdin.isatty()
    console = "stdio,id=console,signal=off" if shell else "stdio,id=console"
    with tempfile.TemporaryDirectory() as scratch:
        initramfs = image.with_job(DEMO, Path(scratch) / "initramfs")
        argv = qemu_argv(image, initramfs, cpus=queues, append="bt.shell" if shell else "")
        argv += [*vhost_user_disk(socket, queues=queues), "-chardev", console, "-serial", "chardev:console"]
        return run_console(argv, interactive=shell)


def run_console(argv: Sequence[str], *, interactive: bool) -> int:
    """Runs QEMU and copies its console to stdout; the job's exit status is read from it."""
    stdin = None if interactive else subprocess.DEVNULL
    job_succeeded = False
    with subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = b""
        while chunk := os.read(process.stdout.fileno(), 4096):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            line = (line + chunk)[-4096:]
            job_succeeded = job_succeeded or b"GUEST-EXIT: 0" in line
    return process.returncode or int(not job_succeeded)


def main() -> int:
    parser = argparse.ArgumentParser(description="Boot a small guest on a vhost-user-blk export.")
    parser.add_argument("socket", type=Path, help="the export's unix socket")
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--image", type=Path, required=True, help="where the kernel and the initramfs are")
    options = parser.parse_args()
    return boot_demo(options.socket, options.queues, options.image)


if __name__ == "__main__":
    sys.exit(main())
