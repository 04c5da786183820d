# SPDX-License-Identifier: Apache-2.0
"""Persistent reservations of a disk that the guest's kernel has: by SG_IO, and through the helper.

The disk is a LUN of tgtd, so that an initiator outside of the guest sees what the guest does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_image import libraries

from target.drivers.protocol.iscsi import Iscsi
from target.reservations import Conflict, Reservations, Type
from tests.guest.conftest import Guest
from tests.guest.test_disk import guest_network
from tests.support.qcow2 import running_graph
from tests.support.tgtd import TARGET, Tgtd, make_disk

pytestmark = [pytest.mark.guest, pytest.mark.timeout(700)]

ISCSISTART = Path("/usr/sbin/iscsistart")
JOB = """
set -e
modprobe iscsi_tcp
modprobe sd_mod
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
iscsistart -i iqn.2026-11.org.example:guest -t {target} -g 1 -a 10.0.2.2 -p {port} > /tmp/iscsistart 2>&1
for i in $(seq 1 100); do [ -b /dev/sda ] && break; sleep 0.1; done
[ -b /dev/sda ] || {{ cat /tmp/iscsistart; exit 1; }}

tell() {{
    name=$1
    shift
    status=0
    blocktarget reservations --output json "$@" > /tmp/out || status=$?
    echo "RESULT $name $status $(cat /tmp/out)"
}}
node=driver=host_device,node-name=d,filename=/dev/sda
tell direct --blockdev $node register,sa-key=0xa1 reserve,type=write-exclusive read-keys read-reservation

blocktarget pr-helper --socket /tmp/pr --user 65534 --pidfile /tmp/pr.pid --daemonize
echo "RESULT capabilities $(grep CapEff /proc/$(cat /tmp/pr.pid)/status)"
chmod 666 /tmp/pr
helped="--object pr-manager-helper,id=pr0,path=/tmp/pr --blockdev $node,pr-manager=pr0"
tell helped $helped read-keys read-reservation report-capabilities
dd if=/dev/zero of=/dev/sda bs=4k count=1 oflag=direct 2> /dev/null
echo "RESULT holder wrote"
echo GUEST-RESERVED
for i in $(seq 1 600); do
    blocktarget reservations $helped read-keys | grep -q a1 || break
    sleep 0.2
done
tell preempted $helped reserve,key=0xa1,type=write-exclusive
if dd if=/dev/zero of=/dev/sda bs=4k count=1 oflag=direct 2> /dev/null; then
    echo "RESULT fenced no"
else
    echo "RESULT fenced yes"
fi
tell read-only $helped,read-only=on clear,key=0xa1
kill -TERM $(cat /tmp/pr.pid)
"""


def actions(result: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status, and what the actions of a call report."""
    status, _, text = result.partition(" ")
    return int(status), json.loads(text)["actions"]


async def test_a_disk_of_the_kernel(scratch: Path, boot_python: Callable[..., Guest]) -> None:
    files = {str(path).lstrip("/"): path.read_bytes() for path in libraries(ISCSISTART)}
    files["sbin/iscsistart"] = ISCSISTART.read_bytes()
    with Tgtd(scratch) as tgtd:
        tgtd.add_target()
        tgtd.add_lun(make_disk(scratch / "lun", 16 << 20))
        guest = boot_python(JOB.format(target=TARGET, port=tgtd.port), guest_network(), files)
        guest.wait_for("GUEST-RESERVED")
        async with running_graph() as graph:
            outside = await graph.add({"node-name": "outside", **tgtd.options()})
            assert isinstance(outside, Iscsi)
            device = Reservations(outside)
            await device.register(0, 0xB2)
            assert sorted((await device.read_keys()).keys) == [0xA1, 0xB2]
            with pytest.raises(Conflict):
                await device.reserve(0xB2, Type.WRITE_EXCLUSIVE)
            with pytest.raises(OSError):
                await outside.write(0, bytes(512))
            await device.preempt(0xB2, 0xA1, Type.EXCLUSIVE_ACCESS)
            await outside.write(0, b"\1" * 512)
            results = guest.finish()
    status, done = actions(results["direct"])
    assert status == 0 and done[2]["keys"] == ["0x00000000000000a1"]
    assert done[3]["reservation"] == {"key": "0x00000000000000a1", "type": "write-exclusive"}
    assert int(results["capabilities"].split()[-1], 16) == 1 << 17
    status, done = actions(results["helped"])
    assert status == 0 and done[0]["keys"] == ["0x00000000000000a1"]
    assert done[1]["reservation"]["type"] == "write-exclusive"
    assert "write-exclusive" in done[2]["capabilities"]["types"]
    assert results["holder"] == "wrote"
    assert actions(results["preempted"])[0] == 2
    assert results["fenced"] == "yes"
    status, done = actions(results["read-only"])
    assert status == 3 and "invalid command operation code" in done[0]["error"]
