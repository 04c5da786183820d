# SPDX-License-Identifier: Apache-2.0
"""The mock iSCSI target is right when no rule makes it wrong: libiscsi's tools and QEMU's driver say so."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from target.peers.iscsi_target import TARGET, Account, IscsiTarget, Limits, faults
from target.peers.iscsi_target.sense import BUSY
from tests.support.tools import qemu_img, qemu_io, run

MIB = 1 << 20
CHAP = "iqn.2026-11.org.example:chap"
ACCOUNT = Account("user", "password1234", "target", "a-secret-of-it")


@pytest.fixture
def mock() -> Iterator[IscsiTarget]:
    with IscsiTarget() as target:
        yield target


def test_discovery_and_inquiry(mock: IscsiTarget) -> None:
    mock.add_disk(8 * MIB)
    mock.add_target(CHAP, ACCOUNT)
    listed = run("iscsi-ls", f"iscsi://{mock.portal}").stdout
    assert f"Target:{TARGET} Portal:{mock.portal},1" in listed
    assert f"Target:{CHAP}" in listed
    assert "Product:MOCK DISK" in run("iscsi-inq", mock.url()).stdout
    assert "BLOCK_LIMITS" in run("iscsi-inq", "-e", "1", "-c", "0", mock.url()).stdout
    assert f"Total size:{8 * MIB}" in run("iscsi-readcapacity16", mock.url()).stdout


def test_chap_both_ways(mock: IscsiTarget) -> None:
    mock.add_target(CHAP, ACCOUNT)
    mock.add_disk(8 * MIB, target=CHAP)
    url = mock.url(target=CHAP)
    run("iscsi-inq", f"{url}?target_user=target&target_password=a-secret-of-it")
    wrong = run("iscsi-inq", f"{url}?target_user=target&target_password=another", check=False)
    assert "Invalid CHAP_R response from the target" in wrong.stderr
    wrong = run("iscsi-inq", url.replace("password1234", "password4321"), check=False)
    assert "Authentication failure" in wrong.stderr
    assert (
        "Authentication failure"
        in run("iscsi-inq", url.partition("@")[0][:8] + url.partition("@")[2], check=False).stderr
    )


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(initial_r2t=True, immediate_data=False, max_burst=8192, first_burst=4096),
        Limits(initial_r2t=True, immediate_data=True, first_burst=512),
        Limits(initial_r2t=False, immediate_data=False, max_receive=1024),
    ],
)
def test_qemu_reads_what_it_wrote(mock: IscsiTarget, limits: Limits, block_size: int) -> None:
    """With all ways in which the data of a write may come."""
    mock.limits = limits
    disk = mock.add_disk(8 * MIB, block_size=block_size)
    qemu_io(
        mock.url(),
        *("write -P 1 0 2M", "write -P 2 5k 512", "read -P 2 5k 512", "read -P 1 8k 1M", "flush"),
        *("discard 1M 64k", "write -z 192k 64k", "write -z -u 256k 64k"),
    )
    assert disk.data[: 5 << 10] == b"\1" * (5 << 10)
    assert disk.data[5 << 10 : (5 << 10) + 512] == b"\2" * 512
    assert not any(disk.data[192 << 10 : 320 << 10])
    assert not any(disk.mapped[MIB // block_size : (MIB + (64 << 10)) // block_size])


def test_digests_and_parallel_requests(mock: IscsiTarget) -> None:
    """libiscsi offers both; a target may insist."""
    mock.limits = Limits(header_digest=("CRC32C",), data_digest=("None",))
    mock.add_disk(8 * MIB)
    assert "finished" in run("iscsi-perf", "-t", "1", "-b", "8", mock.url()).stdout
    qemu_io(mock.url(), "write -P 1 0 2M", "read -P 1 0 2M")
    assert mock.digests == {"header": 2, "data": 0}


def test_qemu_copies_without_moving_data(mock: IscsiTarget) -> None:
    source, destination = mock.add_disk(8 * MIB), mock.add_disk(8 * MIB, lun=2)
    source.fill(MIB, random.Random(1).randbytes(3 * MIB))
    qemu_img("convert", "-n", "-C", "-f", "raw", "-O", "raw", mock.url(), mock.url(lun=2))
    assert destination.data == source.data
    assert destination.copies.copied + source.copies.copied == 3 * MIB
    assert not source.bytes_moved["read"] and not destination.bytes_moved["write"]


def test_qemu_lives_with_busy_and_attention(mock: IscsiTarget) -> None:
    mock.add_disk(8 * MIB)
    busy = mock.rule(faults.on_opcode(0x2A), faults.status(BUSY), count=2)
    attention = mock.rule(faults.on_opcode(0x28), faults.sense(6, 0x2A, 1), count=1)
    qemu_io(mock.url(), "write -P 7 0 4k", "read -P 7 0 4k")
    assert (busy.acted, attention.acted) == (2, 1)


def test_a_rule_that_lets_pass(mock: IscsiTarget) -> None:
    disk = mock.add_disk(8 * MIB)
    mock.rule(faults.on_opcode(0x2A), faults.sense(3, 0x0C, 0), after=1, count=1)
    done = qemu_io(mock.url(), "write -P 1 0 4k", "write -P 2 4k 4k", "write -P 3 8k 4k", check=False)
    assert (done.stdout + done.stderr).count("Input/output error") == 1
    assert disk.data[::4096][:3] == b"\1\0\3"
