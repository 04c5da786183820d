# SPDX-License-Identifier: Apache-2.0
"""The target runs inside of a guest that the tests build."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.conftest import Guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

JOB = """
set -e
blocktarget daemon --blockdev driver=null-co,node-name=n0,size=1M,read-zeroes=on \
    --nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port=10809 \
    --export type=nbd,id=x,node-name=n0,name=disk --pidfile /tmp/pid &
target=$!
for i in $(seq 1 300); do [ -s /tmp/pid ] && break; sleep 0.1; done
nbd-client 127.0.0.1 10809 /dev/nbd0 -N disk -b 4096
echo "RESULT size $(cat /sys/block/nbd0/size)"
echo "RESULT nonzero $(dd if=/dev/nbd0 bs=4k count=4 2>/dev/null | tr -d '\\0' | wc -c)"
nbd-client -d /dev/nbd0 > /dev/null
kill -TERM $target
wait $target
"""


def test_target_serves_inside_a_guest(boot_python: Callable[..., Guest]) -> None:
    results = boot_python(JOB, []).finish()
    assert results == {"size": "2048", "nonzero": "0"}
