# SPDX-License-Identifier: Apache-2.0
"""Jobs that run in the guest (busybox sh), and how what they wrote is compared from outside."""

from __future__ import annotations

from pathlib import Path

from tests.support.tools import check_image, qemu_img, run, sha256

# mke2fs takes its defaults from the copy of /etc/mke2fs.conf in the guest.
FILESYSTEM = """
set -e
dev={device}
echo "RESULT sectors $(cat /sys/block/${{dev##*/}}/size)"
echo "RESULT queues $(ls /sys/block/${{dev##*/}}/mq | wc -l)"
mkfs.ext4 -q -F $dev
mount -t ext4 -o discard $dev /mnt
mkdir /mnt/d
dd if=/dev/urandom of=/mnt/big bs=1M count=16 2>/dev/null
for i in $(seq 1 40); do head -c $((i * 997)) /dev/urandom > /mnt/d/$i; done
dd if=/dev/urandom of=/mnt/gone bs=1M count=4 2>/dev/null
sync
rm /mnt/gone
{{ echo written once; dd if=/dev/urandom bs=4k count=1 2>/dev/null; }} > /mnt/again
sync
dd if=/dev/urandom of=/mnt/again bs=4k count=2 conv=notrunc,fsync 2>/dev/null
cd /mnt; sha256sum big again d/* > /tmp/sums; cd /
fstrim /mnt
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 $dev /mnt
cd /mnt; sha256sum -c /tmp/sums > /tmp/checked || {{ cat /tmp/checked; exit 1; }}
cd /
umount /mnt
e2fsck -fn $dev
while read -r sum name; do echo "RESULT sha256:$name $sum"; done < /tmp/sums
"""


def filesystem_job(device: str) -> str:
    """Makes ext4 on the device, writes, trims, reads back past the cache; prints a sum for each file."""
    return FILESYSTEM.format(device=device)


def compare_outside(results: dict[str, str], image: Path, format: str, scratch: Path) -> None:
    """Asserts that the image checks clean and that each file in it has the sum the guest saw."""
    if format == "qcow2":
        check_image(image)
    raw = scratch / "content.raw"
    qemu_img("convert", "-f", format, "-O", "raw", image, raw)
    run("e2fsck", "-fn", raw)
    sums = {name: value for name, value in results.items() if name.startswith("sha256:")}
    assert len(sums) == 42
    out = scratch / "extracted"
    out.mkdir()
    run("debugfs", "-R", f"rdump / {out}", raw)
    for name, value in sums.items():
        assert sha256(out / name.removeprefix("sha256:")) == value, f"{name} differs from outside"
