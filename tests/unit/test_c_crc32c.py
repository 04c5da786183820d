# SPDX-License-Identifier: Apache-2.0
"""CRC32C as the iSCSI device computes it, and as the mock target does."""

from __future__ import annotations

import pytest

from target.peers.iscsi_target.pdu import crc32c
from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan"])
def test_against_vectors_and_bit_by_bit(c_programs: CPrograms, sanitizer: str) -> None:
    assert c_programs.run(c_programs.build("test_crc32c", sanitizer)) == ["ok"]


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_vectors_of_rfc_3720(data: bytes, crc: int) -> None:
    """Appendix B.4."""
    assert crc32c(data) == crc
